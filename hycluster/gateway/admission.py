"""Who is let in: what is over a gateway's bounds is refused before any work is done for it.

Whoever is refused hears when to come back. That is worked out from what is outstanding and from the pace at which it
has been worked off in the last seconds; see ``docs/limits.md``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hycluster.core import Priority
from hycluster.engine.protocol import MIGRATED
from hycluster.errors import InvalidInput, Overloaded, shown
from hycluster.settings.load import Admission

# Of a request's own id and of its session's: an id travels with every step's output.
MAX_ID_CHARACTERS = 512
# What is told at least; also what is told before there is a pace.
LEAST_RETRY_AFTER_S = 1.0
# Lower goes first; what is behind a batch job may be told apart.
MAX_PRIORITY = 2**31 - 1
# How engines hand caches on to each other; told by the engines' own side, with addresses in it.
ENGINES_OWN = ("kv_transfer_params", "ec_transfer_params")
PACE_WINDOW_S = 15.0
PACE_SAMPLE_S = 0.5


class Pace:
    """Tokens worked off per second, over the last ``PACE_WINDOW_S`` seconds or since the last long silence.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque()

    def note(self, worked_off: int) -> None:
        """Take the count of all tokens worked off so far; called as often as one likes."""
        now = self._clock()
        if self._samples and now - self._samples[-1][0] < PACE_SAMPLE_S:
            return
        self._samples.append((now, worked_off))
        while now - self._samples[0][0] > PACE_WINDOW_S:
            self._samples.popleft()

    def tokens_per_s(self, worked_off: int) -> float | None:
        """The pace until now; None if it has been watched for too short a time to have one."""
        if not self._samples:
            return None
        since, before = self._samples[0]
        seconds = self._clock() - since
        return (worked_off - before) / seconds if seconds >= PACE_SAMPLE_S else None


class Gate:
    """The bounds of one gateway.

    Args:
        model: its model's name, for the errors.
        clock: seconds, monotonic.
        left: called with the sequences of one that it has let in, and that was left before it was sent.

    Attributes:
        held: places of requests that were let in, and that have not been sent (``places.py``).
    """

    def __init__(
        self,
        model: str,
        bounds: Admission,
        clock: Callable[[], float] = time.monotonic,
        left: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.held = 0
        self.left = left
        self._model = model
        self._bounds = bounds
        self._pace = Pace(clock)

    def check(self, sequences: int, *, in_flight: int, outstanding_tokens: int, worked_off_tokens: int) -> None:
        """Let a request in, or not.

        Args:
            sequences: that it asks for.
            in_flight: sequences that the gateway has in the engines.
            outstanding_tokens: that these have still to prefill or may still decode.
            worked_off_tokens: of all sequences so far: prefilled, decoded, or given up at their end.

        Raises:
            Overloaded: a bound is reached; says when there will be room.
            InvalidInput: it asks for more sequences than are ever let in.
        """
        most, bounds = self._bounds.max_requests, self._bounds
        in_flight += self.held
        self._pace.note(worked_off_tokens)
        if most is not None and sequences > most:
            raise InvalidInput(f"n: {sequences} sequences are not allowed; a request may ask for at most {most}")
        if most is not None and in_flight + sequences > most:
            # Places come free as their tokens are worked off.
            ahead = outstanding_tokens * min(1.0, (in_flight + sequences - most) / in_flight)
            raise Overloaded(
                f"model: {self._model!r} has {in_flight} requests in flight; at most {most} are admitted",
                retry_after_s=self._retry_after_s(ahead, worked_off_tokens),
            )
        limit = bounds.max_outstanding_tokens
        if limit is not None and outstanding_tokens >= limit:
            raise Overloaded(
                f"model: {self._model!r} has {outstanding_tokens} tokens outstanding; at most {limit} are admitted",
                retry_after_s=self._retry_after_s(outstanding_tokens - limit + 1, worked_off_tokens),
            )

    def _retry_after_s(self, tokens_ahead: float, worked_off: int) -> float:
        pace = self._pace.tokens_per_s(worked_off)
        if pace is None:
            return LEAST_RETRY_AFTER_S
        most = self._bounds.max_retry_after_s
        # Nothing has moved for as long as anybody has asked: there is no telling.
        return min(most, max(LEAST_RETRY_AFTER_S, tokens_ahead / pace)) if pace > 0 else most


def check_id(field: str, value: str | None) -> None:
    """Refuse an id that would cost too much to carry along, or that is no text: JSON can say half a surrogate pair.

    Raises:
        InvalidInput: names the field.
    """
    if value is None:
        return
    check_text(field, value)
    if len(value) > MAX_ID_CHARACTERS:
        raise InvalidInput(f"{field}: {shown(value)} is too long; at most {MAX_ID_CHARACTERS} characters are allowed")


def check_text(field: str, value: str) -> None:
    """Refuse what is no text: JSON can say half a surrogate pair, of which tokenizers make errors of any kind.

    Raises:
        InvalidInput: names the field.
    """
    if not value.isprintable() and any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidInput(f"{field}: {shown(value)} is not allowed; must be text that UTF-8 can hold")


def check_priority(priority: int) -> None:
    """Nobody goes before those who wait for their answers.

    Raises:
        InvalidInput
    """
    if not Priority.ONLINE <= priority <= MAX_PRIORITY:
        raise InvalidInput(
            f"priority: {shown(priority)} is not allowed; must be {int(Priority.ONLINE)} (the default, goes first)"
            f" to {MAX_PRIORITY}"
        )


def check_sampling(extra: Mapping[str, Any], bad_words: Sequence[str]) -> None:
    """Refuse what passes between gateways and engines, and what tokenizers break on.

    Raises:
        InvalidInput: names the field.
    """
    if MIGRATED in extra:
        raise InvalidInput(f"vllm_xargs: {MIGRATED!r} is not allowed; it is how gateways migrate requests")
    for name in ENGINES_OWN:
        if extra.get(name) is not None:
            raise InvalidInput(f"{name}: is not allowed, nor in vllm_xargs; it is how engines pass caches on")
    for place, word in enumerate(bad_words):
        check_text(f"bad_words[{place}]", word)
