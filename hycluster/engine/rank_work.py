"""What the ranks of a data-parallel group tell each other of their work. Pure.

They step together, and each step lasts as long as the longest of theirs. So a rank has to know whether a sibling has
online work, and how much, before it fills its own step with bulk; and what the others computed in a step, to learn from
its duration. A rank says so when it has materially changed, which is a few small messages a second.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from hycluster.engine.step_time import StepWork

# A share by which work has to change to be told again, and what is too little to matter.
_MATERIAL, _SEQUENCES, _PREFILL_TOKENS, _KV_TOKENS = 0.2, 2, 64, 4096


@dataclass(frozen=True, slots=True)
class RankWork:
    """What a rank has in a step.

    Attributes:
        prefill_tokens, sequences, kv_tokens, prefill_pairs: of all rows, as in :class:`StepWork`.
        online_sequences, online_kv_tokens: of online ones; none is no online work.
    """

    prefill_tokens: int = 0
    sequences: int = 0
    kv_tokens: int = 0
    online_sequences: int = 0
    online_kv_tokens: int = 0
    prefill_pairs: int = 0

    @classmethod
    def of(cls, work: StepWork, online: StepWork) -> RankWork:
        rows, kv = online.sequences, online.kv_tokens
        return cls(work.prefill_tokens, work.sequences, work.kv_tokens, rows, kv, work.prefill_pairs)

    def differs(self, other: RankWork) -> bool:
        """Whether the others have to know."""
        return (self.online_sequences > 0) != (other.online_sequences > 0) or any(
            abs(here - there) > max(_MATERIAL * max(here, there), least)
            for here, there, least in (
                (self.prefill_tokens, other.prefill_tokens, _PREFILL_TOKENS),
                (self.sequences, other.sequences, _SEQUENCES),
                (self.kv_tokens, other.kv_tokens, _KV_TOKENS),
                (self.online_sequences, other.online_sequences, _SEQUENCES),
                (self.online_kv_tokens, other.online_kv_tokens, _KV_TOKENS),
            )
        )


# For those that have not seen it yet: a request has come, and will be in the next step.
ARRIVAL = RankWork(sequences=1, online_sequences=1)


@dataclass(slots=True)
class Siblings:
    """The other ranks of an engine's group, as it knows them. False where there are none.

    Attributes:
        send: tells them of this rank's work; None where there are none.
    """

    send: Callable[[RankWork], None] | None = None
    _heard: dict[int, RankWork] = field(default_factory=dict)
    _told: RankWork = RankWork()
    _telling: threading.Lock = field(default_factory=threading.Lock)

    def __bool__(self) -> bool:
        return self.send is not None

    def hear(self, rank: int, work: RankWork) -> None:
        """May be called by any thread, also during a step."""
        self._heard[rank] = work

    def tell(self, work: RankWork) -> None:
        """Have the others know, if it matters. By the engine's own thread; for an arrival the one it comes by."""
        with self._telling:
            if self.send is not None and work.differs(self._told):
                self._told = work
                self.send(work)

    def tell_arrival(self) -> None:
        """Before the step that is going on is over: after it, theirs have begun."""
        if not self._told.online_sequences:
            self.tell(ARRIVAL)

    @property
    def online_work(self) -> StepWork | None:
        """The most that one of them has of online work, but for prompts, which come and go; None if none has."""
        online = [work for work in self._heard.copy().values() if work.online_sequences]
        if not online:
            return None
        most = max(work.online_sequences for work in online)
        return StepWork(
            0,
            most,
            max(work.online_kv_tokens for work in online),
            elsewhere_tokens=sum(work.online_sequences for work in online) - most,
        )

    @property
    def tokens(self) -> int:
        """What all of them have in a step."""
        return sum(work.prefill_tokens + work.sequences for work in self._heard.copy().values())

    @property
    def ranks(self) -> int:
        """Of the group, this one with them."""
        return 1 + len(self._heard)

    def longest(self, own: StepWork) -> StepWork:
        """Of all ranks' work the most of each kind: what the time of a step is to be explained by."""
        heard = self._heard.copy().values()
        if not heard:
            return own
        prefill = max(own.prefill_tokens, *(work.prefill_tokens for work in heard))
        sequences = max(own.sequences, *(work.sequences for work in heard))
        return StepWork(
            prefill,
            sequences,
            max(own.kv_tokens, *(work.kv_tokens for work in heard)),
            max(own.prefill_pairs, *(work.prefill_pairs for work in heard)),
            # Experts are read for the tokens of all ranks.
            elsewhere_tokens=own.prefill_tokens + own.sequences + self.tokens - prefill - sequences,
        )
