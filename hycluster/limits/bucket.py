"""One limit in the directory's book: what has been given of it, and what may be given now.

By the minute: within a minute no more than the limit. A limit that has not been used may be used at once. While
requests are refused, what comes free is given out at an even pace, so that over any longer time it is the limit's share
of that time, however often callers come back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hycluster.limits.slots import MINUTE_S, WINDOW_S, Slot, SlotUsage

# Paced, no minute has more than this part of the limit, or one request more than that.
PACED_SHARE = 1.017
# The even pace by the limit's: a little of what is given is on its way back all the time.
PACE = 1.009
# And as much again as is on its way back; of that it is not known for sure whether it will come, so no more than this.
RETURNING_SHARE = 0.02
# The pace begins so much before the minute is over that the first burst has used: what is given is used a little later.
LEAD_S = 0.5
# Requests were refused so lately: there are more than fit. Of few requests none may come for longer, by chance.
PRESSED_S = 2.0
PRESSED_REQUESTS = 20
MOST_PRESSED_S = 20.0
# What has come free for so long is not made up for later.
BACKLOG_S = 10.0
# What a process is given beyond what requests wait for, at most, of the limit: that much is not known of one that dies.
AHEAD = 0.01
# How long what comes free is kept for one whose request needs more than there is.
SAVED_S = 1.0
# What was used beyond a limit is paid off in so many minutes; what they don't suffice for is let go.
MOST_OWED_MINUTES = 60


@dataclass(frozen=True, slots=True)
class LeasePace:
    """How what comes free is given out evenly.

    Attributes:
        free: at ``at_s``; what comes free later is added then.
    """

    free: float
    at_s: float


class Bucket:
    """The book on one limit by the minute, the day or the month.

    Attributes:
        usage: what was given.
        sequence: counts the changes of ``usage``.
    """

    def __init__(self, *, period: bool) -> None:
        self.usage = SlotUsage(period)
        self.sequence = 0
        self._marks: dict[Slot, int] = {}
        self._period = period
        self._pressed_until_s = float("-inf")
        # Whether what is free is given out at the pace; what of it there is, as of then.
        self._paced = False
        self._free, self._at_s = 0.0, float("-inf")
        # What of all that is given and not used is on its way back.
        self._returning, self._returned_s = 0.0, 0.0
        self._saving: tuple[str, float] | None = None
        self._recovered = -1
        self._baseline: dict[Slot, int] = {}

    def press(self, now_s: float, for_s: float = PRESSED_S) -> None:
        """Requests were refused; see :func:`pressed_for_s`."""
        self._pressed_until_s = max(self._pressed_until_s, now_s + for_s)

    def give(
        self, who: str, *, limit: int, want: int, need: int, least: int, processes: int, now_s: float, period: str = ""
    ) -> int:
        """Give a process a lease.

        Args:
            want: what it may use within a second, by what it was asked for lately.
            need: that part of it for which requests wait.
            least: what the smallest of those that wait, or were refused, needs; less is of no use to it.
            processes: that have asked lately.
        """
        free = int(self._free_now(limit, least, now_s, period))
        if want <= 0 or (self._saving is not None and self._saving[0] != who and now_s < self._saving[1]):
            return 0
        given = min(need, free)
        if not self._paced:
            # What is held somewhere ahead of its time is not there for others who need it.
            given = max(given, min(want, int(AHEAD * limit), free // (2 * processes)))
        if given < least:
            if least > 1:
                # Nobody needs less than one.
                self._saving = (who, now_s + SAVED_S)
            return 0
        self._saving = None
        self._count(given, now_s, period)
        return given

    def charge(self, amount: int, now_s: float, period: str = "", age_s: float = 0.0, limit: int | None = None) -> None:
        """So long ago a request has used more than was reserved, or a process has helped itself.

        Args:
            limit: by the minute, what is beyond it is owed: nothing is given until the pace has paid it off. Else
                whoever reserves little and uses much would have that much in every minute.
        """
        if limit and not self._period and not self._paced and self.usage.used(now_s) + amount > limit:
            self._begin_pace(limit, now_s)
        self._count(amount, now_s - age_s, period)

    def take_back(self, amount: int, now_s: float, period: str = "", age_s: float = 0.0) -> None:
        """What was given so long ago has not been used."""
        if not self.usage.period and age_s > WINDOW_S:
            # Nor does it count any more.
            return
        self.sequence += 1
        self._free += amount
        # By Little's law: what came back within the last minute, times how long it was out.
        self._returning = self._returns(now_s) + amount * age_s / MINUTE_S
        self._returned_s = now_s
        for slot in self.usage.take_back(amount, now_s, period, age_s):
            self._marks[slot] = self.sequence

    def at_least(self, amount: int, period: str) -> None:
        """So much is known to have been used, from elsewhere."""
        if self.usage.slots.get(period, 0) < amount:
            self.sequence += 1
            self.usage.slots[period] = amount
            self._marks[period] = self.sequence

    def changed_since(self, sequence: int) -> list[tuple[Slot, int]]:
        """Slots that are not any more as they were then."""
        slots = self.usage.slots
        self._marks = {slot: mark for slot, mark in self._marks.items() if slot in slots}
        return [(slot, slots[slot]) for slot, mark in self._marks.items() if mark > sequence]

    @property
    def pace(self) -> LeasePace | None:
        """By which it gives now; None where what is free is given out at once."""
        return LeasePace(self._free, self._at_s) if self._paced else None

    def recover(
        self,
        heard: int,
        given: Iterable[tuple[Slot, int]],
        pace: LeasePace | None,
        now_s: float,
        for_s: float = PRESSED_S,
    ) -> None:
        """Go on from what a process has heard of a book that is lost; who heard last knows most.

        Args:
            for_s: what was given at a pace still is, for so long.
        """
        if heard <= self._recovered:
            return
        now, before, known = self.usage.slots, self._baseline, dict(given)
        # What was charged here meanwhile is in nobody's memory.
        since = {slot: now[slot] - before.get(slot, 0) for slot in now}
        self._recovered, self._baseline = heard, known
        self.usage.slots = {slot: known.get(slot, 0) + since.get(slot, 0) for slot in {*known, *since}}
        self._paced = pace is not None
        if pace is not None:
            self.press(now_s, for_s)
            self._free, self._at_s = pace.free - sum(since.values()), pace.at_s
        self.sequence = max(self.sequence, heard) + 1
        self._marks = dict.fromkeys(self.usage.slots, self.sequence)

    def wait_s(self, amount: int, limit: int, now_s: float) -> float:
        """When so much may be had, as far as can be told."""
        wait_s = self.usage.until_free_s(amount, limit, now_s)
        short = amount - self._free
        return max(wait_s, max(0.0, self._at_s - now_s) + short * MINUTE_S / limit if short > 0 else 0.0)

    def _free_now(self, limit: int, least: int, now_s: float, period: str) -> float:
        per_s = PACE * limit / MINUTE_S
        owes = self._paced and self._free + max(0.0, now_s - self._at_s) * per_s < 0
        if self._period or (now_s >= self._pressed_until_s and not owes):
            room = max(0, limit - self.usage.used(now_s, period))
            self._paced, self._free, self._at_s = False, room, now_s
            return room
        used = self.usage.used(now_s, lately_s=MINUTE_S)
        if not self._paced:
            self._begin_pace(limit, now_s)
        self._free = max(self._free, -float(MOST_OWED_MINUTES * limit))
        if now_s > self._at_s:
            backlog = BACKLOG_S * per_s + least
            self._free = max(self._free, min(self._free + (now_s - self._at_s) * per_s, backlog))
            self._at_s = now_s
        most = max(PACED_SHARE * limit, limit + 1) + min(self._returns(now_s), RETURNING_SHARE * limit)
        return max(0.0, min(self._free, most - used))

    def _begin_pace(self, limit: int, now_s: float) -> None:
        """A minute's worth may be used at once, and then it is as if that had been given at the pace."""
        self._paced, self._free = True, limit - self.usage.used(now_s, lately_s=MINUTE_S)
        self._at_s = max(now_s, self.usage.began_s(now_s) + (MINUTE_S - LEAD_S) / PACE)

    def _returns(self, now_s: float) -> float:
        return self._returning * math.exp((self._returned_s - now_s) / MINUTE_S)

    def _count(self, amount: int, now_s: float, period: str) -> None:
        self.sequence += 1
        self._free -= amount
        self._marks[self.usage.note(amount, now_s, period)] = self.sequence


class PlacesInUse:
    """The book on one limit of concurrent requests: who has how many places."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def give(self, who: str, *, limit: int, want: int, holds: int, gone: set[str]) -> int:
        """Give a process more places.

        Args:
            holds: that it has already.
            gone: processes that have not been heard of for so long that their requests have ended.
        """
        self._held = {other: held for other, held in self._held.items() if other not in gone}
        self._held[who] = holds
        given = max(0, min(want, limit - self.used))
        self._held[who] += given
        return given

    @property
    def used(self) -> int:
        """PlacesInUse that processes have."""
        return sum(self._held.values())


def pressed_for_s(limit: int) -> float:
    """How long it is known from a refused request that there are more than fit, if each needs one of the limit."""
    return min(MOST_PRESSED_S, max(PRESSED_S, PRESSED_REQUESTS * MINUTE_S / limit))
