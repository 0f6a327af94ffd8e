"""The directory's book on all limits, and what processes and it tell each other.

The book is soft state. Each process hears what all have got, so that a new book goes on from what the one knows that
heard last; until all have had the time to tell it, it gives nothing.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hycluster.limits.bucket import Bucket, LeasePace, PlacesInUse, pressed_for_s
from hycluster.limits.lease import Leases
from hycluster.limits.slots import SLOT_S, Slot

PLACES = "concurrent_requests"
PERIODS: frozenset[str] = frozenset({"tokens_per_day", "budget_per_month"})
# Processes ask twice a second as long as they hold anything.
ASK_EVERY_S = 0.5
RECOVERS_S = 1.5
# A process that is silent for so long does not admit any more, and then has ended what it had.
GONE_AFTER_S = 10.0
# A limit that nobody has asked for is forgotten; what was used of a day or a month is in the database.
FORGOTTEN_AFTER_S = 120.0

# Whose limit, and of which kind.
Name = tuple[str, str]


@dataclass(frozen=True, slots=True)
class LeaseAsk:
    """What a process says of one limit.

    Attributes:
        limit: as the database has it.
        want, need, least: see :meth:`Bucket.give`.
        refused: requests have been, since it last asked.
        corrections: what requests used beyond what they had reserved, and what the process has helped itself to while
            there was no book; negative is what was leased and has not been used. See :meth:`Corrections.tell`.
        unspent: what of its leases no request has taken yet.
        word: the number of this one. ``answered`` is that of the last one whose answer was heard.
        holds: of places, how many it has.
        heard: the sequence of the book's last word.
        period: the day or month that it is now.
        base: what the database says was used of that.
        known: for a new book what was given, with the ages of it, or by periods.
        pace: for a new book, too; its time is an age.
    """

    limit: int
    want: int = 0
    need: int = 0
    least: int = 0
    refused: bool = False
    corrections: tuple[tuple[int, float, int], ...] = ()
    unspent: int = 0
    word: int = 0
    answered: int = 0
    holds: int = 0
    heard: int = 0
    period: str = ""
    base: int = 0
    known: tuple[tuple[float | str, int], ...] | None = None
    pace: LeasePace | None = None


def is_short(ask: LeaseAsk, given: int) -> bool:
    """Whether requests have to be refused that met this."""
    return given < ask.want and (ask.refused or given < max(ask.need, ask.least))


@dataclass(frozen=True, slots=True)
class Told:
    """What the book says of one limit.

    Attributes:
        given: of what was wanted.
        changed: slots that were given from since the process last heard, with all that was given of each.
        used: of places.
        wait_s: when there may be more, if too little was given.
        pace: by which it is given out, if it is.
    """

    given: int = 0
    sequence: int = 0
    changed: tuple[tuple[Slot, int], ...] = ()
    used: int = 0
    wait_s: float = 0.0
    pace: LeasePace | None = None


@dataclass(frozen=True, slots=True)
class LeaseAnswer:
    """What the book says.

    Attributes:
        book: which one it is; one that the process does not know has given nothing, and is to be told all.
        now_s: by its clock.
        processes: that have asked lately.
        recovers: it does not know yet what was given.
    """

    book: str
    now_s: float
    processes: int
    recovers: bool = False
    told: dict[Name, Told] = field(default_factory=dict)


class LeaseBook:
    """The book on all limits.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._id = secrets.token_hex(8)
        self._began_s = clock()
        self._buckets: dict[Name, Bucket] = {}
        self._leases: dict[Name, Leases] = {}
        self._places: dict[Name, PlacesInUse] = {}
        self._asked_s: dict[Name, float] = {}
        self._heard_s: dict[str, float] = {}
        self._forgets_s = self._began_s + FORGOTTEN_AFTER_S

    def lease(self, who: str, book: str, asks: dict[Name, LeaseAsk]) -> LeaseAnswer:
        """A process says what it has used and wants, and hears what it gets.

        Args:
            book: that it believes to talk to; empty if it has not heard of any.
        """
        now_s = self._clock()
        if now_s >= self._forgets_s:
            self._forget(now_s)
        self._heard_s[who] = now_s
        gone = {other for other, at_s in self._heard_s.items() if now_s - at_s > GONE_AFTER_S}
        self._heard_s = {other: at_s for other, at_s in self._heard_s.items() if other not in gone}
        if book != self._id and any(ask.known is None for ask in asks.values()):
            return LeaseAnswer(self._id, now_s, len(self._heard_s), recovers=True)
        recovers = now_s - self._began_s < RECOVERS_S
        told = {name: self._tell(who, name, ask, now_s, gone, recovers=recovers) for name, ask in asks.items()}
        return LeaseAnswer(self._id, now_s, len(self._heard_s), recovers, told)

    def used(self) -> dict[Name, int]:
        """What is used of the limits by the minute and of concurrent requests that somebody has asked for lately."""
        now_s = self._clock()
        minutes = {name: bucket.usage.used(now_s) for name, bucket in self._buckets.items() if name[1] not in PERIODS}
        return minutes | {name: places.used for name, places in self._places.items()}

    def _tell(self, who: str, name: Name, ask: LeaseAsk, now_s: float, gone: set[str], *, recovers: bool) -> Told:
        self._asked_s[name] = now_s
        if name[1] == PLACES:
            places = self._places.setdefault(name, PlacesInUse())
            want = 0 if recovers else ask.want
            given = places.give(who, limit=ask.limit, want=want, holds=ask.holds, gone=gone)
            return Told(given, used=places.used, wait_s=ASK_EVERY_S if is_short(ask, given) else 0.0)
        new = name not in self._buckets
        bucket = self._buckets.setdefault(name, Bucket(period=name[1] in PERIODS))
        if ask.known is not None and (new or recovers):
            given_then = [(_slot(age, now_s), amount) for age, amount in ask.known]
            pace = ask.pace and LeasePace(ask.pace.free, now_s - ask.pace.at_s)
            bucket.recover(ask.heard, given_then, pace, now_s, pressed_for_s(ask.limit))
        if ask.base and (new or recovers):
            # Later it may be behind what has been given back here.
            bucket.at_least(ask.base, ask.period)
        leases = self._leases.setdefault(name, Leases(bucket))
        counted = leases.heard(who, ask.word, ask.answered, now_s)
        leases.take_back(now_s, FORGOTTEN_AFTER_S)
        for word, age_s, amount in ask.corrections:
            if word <= counted:
                continue
            if amount > 0:
                bucket.charge(amount, now_s, ask.period, age_s, ask.limit)
            else:
                bucket.take_back(-amount, now_s, ask.period, age_s)
        if ask.refused:
            bucket.press(now_s, pressed_for_s(ask.limit))
        given = 0
        if not recovers:
            given = bucket.give(
                who,
                limit=ask.limit,
                want=ask.want,
                need=ask.need,
                least=ask.least,
                processes=len(self._heard_s),
                now_s=now_s,
                period=ask.period,
            )
        leases.gave(who, ask.word, given, need=ask.need, unspent=ask.unspent, period=ask.period, now_s=now_s)
        wait_s = 0.0
        if is_short(ask, given):
            wait_s = RECOVERS_S if recovers else bucket.wait_s(max(1, ask.least), ask.limit, now_s)
        # A new book's count may be behind what a process has heard of another one.
        heard = ask.heard if ask.known is None else -1
        return Told(given, bucket.sequence, tuple(bucket.changed_since(heard)), 0, wait_s, bucket.pace)

    def _forget(self, now_s: float) -> None:
        self._forgets_s = now_s + FORGOTTEN_AFTER_S
        for name in [name for name, at_s in self._asked_s.items() if now_s - at_s > FORGOTTEN_AFTER_S]:
            del self._asked_s[name]
            self._places.pop(name, None)
            self._buckets.pop(name, None)
            self._leases.pop(name, None)


def _slot(age: float | str, now_s: float) -> Slot:
    return age if isinstance(age, str) else int((now_s - age) // SLOT_S)
