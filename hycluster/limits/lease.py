"""What is between a process and the book, either of which may die, and each of whose words may be lost on its way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hycluster.limits.bucket import Bucket
from hycluster.limits.slots import MINUTE_S, SLOT_S

# A process has let go of an unused lease before, and asks several times in so long; what it had is given to others.
SILENT_S = 3.0


@dataclass(slots=True)
class Lent:
    """What one process has of one limit, as far as the book knows.

    Attributes:
        word: the last that was heard of the process.
        given: then; ``unspent`` is the part of all it has that no request is known to have taken.
        at_s: when that was.
        taken_back: what of it was given to others, since the process has been silent.
    """

    word: int
    given: int
    unspent: int
    period: str
    at_s: float
    taken_back: int = 0


class Leases:
    """The book's side: who has what of one bucket, so that nothing is lost with a process or an answer.

    Args:
        bucket: is told what comes back.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._of: dict[str, Lent] = {}

    def heard(self, who: str, word: int, answered: int, now_s: float) -> int:
        """A process says something; returns its last word before, up to which nothing is to be counted again.

        Args:
            word: the number of this one; they grow.
            answered: the number of the last one whose answer it has heard.
        """
        last = self._of.get(who)
        if last is None:
            return 0
        age_s = now_s - last.at_s
        if last.taken_back:
            # It lives, and says itself what became of it.
            self._bucket.charge(last.taken_back, now_s, last.period, age_s)
            last.taken_back = 0
        if last.word > answered and last.given:
            self._bucket.take_back(last.given, now_s, last.period, age_s)
        last.unspent = 0
        return last.word

    def gave(self, who: str, word: int, given: int, *, need: int, unspent: int, period: str, now_s: float) -> None:
        """It gets so much.

        Args:
            need: what requests wait for; that part of it is used at once.
            unspent: what it has beside that.
        """
        self._of[who] = Lent(word, given, unspent + max(0, given - need), period, now_s)

    def take_back(self, now_s: float, forgotten_after_s: float) -> None:
        """Take back what those had who are silent."""
        for who, lease in list(self._of.items()):
            silent_s = now_s - lease.at_s
            if silent_s > forgotten_after_s:
                del self._of[who]
            elif silent_s > SILENT_S and lease.unspent:
                self._bucket.take_back(lease.unspent, now_s, lease.period, silent_s)
                lease.taken_back, lease.unspent = lease.unspent, 0


class Corrections:
    """A process's side: what its requests have used beyond its leases, or less (negative). Told until it is heard.

    Times are by the process's own clock.
    """

    def __init__(self) -> None:
        # By slots; of those that were told, by the word with which that was first, too.
        self._new: Counter[int] = Counter()
        self._told: Counter[tuple[int, int]] = Counter()

    def __bool__(self) -> bool:
        return bool(self._new or self._told)

    def note(self, amount: int, at_s: float) -> None:
        """Of what was leased then."""
        self._new[int(at_s // SLOT_S)] += amount

    def tell(self, word: int, now_s: float, *, of_a_period: bool) -> tuple[tuple[int, float, int], ...]:
        """All that has not been heard: the word with which it was first told, its age in seconds, and how much.

        Args:
            of_a_period: of days and months it doesn't matter how old it is; by the minute it is forgotten.
        """
        untold = [(word, slot, amount) for slot, amount in self._new.items()]
        self._new.clear()
        for (first, slot), amount in [*self._told.items()]:
            if slot * SLOT_S < now_s - MINUTE_S:
                # No book that lives has heard it, and there may be many.
                del self._told[first, slot]
                untold.append((word, slot, amount))
        oldest = int((now_s - MINUTE_S) // SLOT_S)
        for first, slot, amount in untold:
            if of_a_period or slot > oldest:
                self._told[first, max(slot, oldest)] += amount
        return tuple((first, now_s - slot * SLOT_S, amount) for (first, slot), amount in self._told.items())

    def heard(self, word: int) -> None:
        """The book has answered this one."""
        self._told = Counter({told: amount for told, amount in self._told.items() if told[0] > word})

    def clear(self) -> None:
        """Another day or month."""
        self._new.clear()
        self._told.clear()
