"""What one process holds of one limit: its lease, and what it has heard of the whole."""

from __future__ import annotations

from hycluster.limits.book import ASK_EVERY_S, PERIODS, PLACES, LeaseAnswer, LeaseAsk, Name, Told, is_short
from hycluster.limits.bucket import PRESSED_S, LeasePace, pressed_for_s
from hycluster.limits.lease import Corrections
from hycluster.limits.slots import MINUTE_S, SLOT_S, SlotUsage

# A lease that lies unused for so long goes back.
HELD_S = 1.0
# Where less than half of a limit is used, all processes together may let requests in ahead of their leases by this part
# of it, between two words to the book: no request waits for a word that says what is known. It is what would not be
# counted if all of them were killed then.
GOES_AHEAD = 1 / 200
# The book's last word is no older then.
_LATELY_S = 2 * ASK_EVERY_S + 0.2


class Holding:
    """One limit at one process. Times are by the process's own monotonic clock, in seconds.

    Attributes:
        limit: as the database has it.
        period: the day or month that it is.
    """

    def __init__(self, name: Name, limit: int) -> None:
        self.name = name
        self.limit = limit
        self.period = ""
        self._base = 0
        self._base_of = ""
        self._places = name[1] == PLACES
        self._balance = self._in_use = 0
        # Requests that have reserved something and have not ended.
        self._open = 0
        self._leased_s = self._active_s = float("-inf")
        # What requests needed since it last asked; and in this half of a second, and in the one before.
        self._demand = self._half = self._half_before = 0
        self._half_began_s = float("-inf")
        self._corrections = Corrections()
        self._answered = 0
        self._least = 0
        self._refused = False
        self._dry_until_s, self._wait_s = float("-inf"), 0.0
        self._told_holds = 0
        # What it has heard: of which book, by whose clock.
        self._usage = SlotUsage(name[1] in PERIODS)
        self._book, self._heard, self._ahead_s, self._processes = "", -1, 0.0, 1
        self._pace: LeasePace | None = None
        self._places_used = 0
        self._told = False
        # What all processes together have helped themselves to since the book's last word, if all do as this one; and
        # may while requests are refused.
        self._helped = SlotUsage(self._usage.period)
        self._own, self._own_s, self._pressed_until_s = 0.0, float("-inf"), float("-inf")
        # What requests were let in with ahead of leases since then, and when that was.
        self._went_ahead, self._heard_s = 0, float("-inf")

    # -- requests -----------------------------------------------------------------------------------------

    def has(self, amount: int, now_s: float) -> bool:
        """Whether the lease has so much left."""
        if not self._places:
            self.expire(now_s)
        return self._balance >= amount

    def is_dry(self, now_s: float) -> bool:
        """The book has said lately that there is no more."""
        return now_s < self._dry_until_s

    def want(self, amount: int, now_s: float) -> None:
        """A request needs so much."""
        self._active_s = now_s
        self._turn(now_s)
        self._demand += amount
        self._half += amount

    def take(self, amount: int) -> None:
        """It gets it, until it is settled."""
        self._open += 1
        self._balance -= amount
        if self._places:
            self._in_use += amount

    def refuse(self, amount: int, now_s: float) -> float:
        """It is refused; returns the seconds after which it may come back."""
        self._refused, self._pressed_until_s = True, now_s + pressed_for_s(self.limit)
        self._least = min(amount, self._least or amount)
        return self._wait_s

    def settle(self, reserved: int, used: int, age_s: float, period: str, now_s: float) -> None:
        """A request that had reserved so much, so long ago, has ended."""
        self._open -= 1
        if self._places:
            self._in_use -= reserved
            self._balance += reserved
            self._leased_s = self._active_s = now_s
        elif used < reserved and period == self.period:
            self._corrections.note(used - reserved, now_s - age_s)
        elif used > reserved:
            self._corrections.note(used - reserved, now_s)

    def help_itself(self, amount: int, now_s: float) -> bool:
        """Take a part for this process while there is no book: that which all others leave if they do the same."""
        if self._places or not self._book:
            return False
        theirs_s = now_s + self._ahead_s
        room = self.limit - self._usage.used(theirs_s, self.period) - self._helped.used(theirs_s, self.period)
        per_s = self.limit / MINUTE_S
        most = PRESSED_S * per_s + amount * self._processes
        self._own = min(self._own + max(0.0, now_s - self._own_s) * per_s, most)
        self._own_s = max(self._own_s, now_s)
        owes = self._pace is not None and self._pace.free < 0
        if not self._usage.period and (now_s < self._pressed_until_s or owes):
            room = min(room, int(self._own))
        if room < amount * self._processes:
            return False
        self._own -= amount * self._processes
        self._helped.note(amount * self._processes, theirs_s, self.period)
        self._balance += amount
        self._leased_s = now_s
        self._corrections.note(amount, now_s)
        return True

    def go_ahead(self, amount: int, now_s: float) -> bool:
        """Let a request in ahead of a lease, which the book hears of next; only far from the limit, and no more than
        :data:`GOES_AHEAD`."""
        lately = self._told and now_s - self._heard_s < _LATELY_S
        if not lately or now_s < self._pressed_until_s or self.is_dry(now_s):
            return False
        if self._usage.period and self._base_of != self.period:
            return False
        taken = (self._went_ahead + amount) * self._processes
        used = self._places_used if self._places else self._usage.used(now_s + self._ahead_s, self.period)
        if taken > self.limit * GOES_AHEAD or 2 * (used + taken) > self.limit:
            return False
        self._went_ahead += amount
        self._balance += amount
        self._leased_s = now_s
        if not self._places:
            self._corrections.note(amount, now_s)
        return True

    @property
    def remaining(self) -> int:
        """Of the limit, as far as is known here."""
        used = self._places_used if self._places else sum(self._usage.slots.values())
        return max(0, min(self.limit, self.limit - used + max(0, self._balance)))

    def reset_s(self, now_s: float) -> float:
        """When all of a limit by the minute is there again, if nothing more is used."""
        newest = max((slot for slot, amount in self._usage.slots.items() if amount), default=None)
        if not isinstance(newest, int):
            return 0.0
        theirs_s = now_s + self._ahead_s
        left_s = min(MINUTE_S, (newest + 1) * SLOT_S + MINUTE_S - theirs_s)
        if self._pace is not None:
            # More than a minute if something is owed.
            left_s = max(left_s, self._pace.at_s - theirs_s - self._pace.free * MINUTE_S / self.limit)
        return max(0.0, left_s)

    @property
    def known(self) -> bool:
        """Something has been heard of it."""
        return self._told

    def has_base(self, period: str) -> bool:
        """It is known what the database says of a period."""
        return self._base_of == period

    def set_base(self, period: str, amount: int) -> None:
        """The database says that so much was used of this period."""
        self._base_of, self._base = period, amount

    def _turn(self, now_s: float) -> None:
        age_s = now_s - self._half_began_s
        if age_s >= ASK_EVERY_S:
            self._half_before = self._half if age_s < 2 * ASK_EVERY_S else 0
            self._half, self._half_began_s = 0, now_s

    def _expected(self, now_s: float) -> int:
        """What requests will need soon: it is asked for whether any of them waits or not."""
        if self._places and not self._refused:
            # They would lie idle while others need them.
            return 0
        if self._places or now_s < self._pressed_until_s:
            return self._demand
        # For a second, though requests come in bursts, and also where it is asked sooner since some wait: else they
        # would wait again and again.
        self._turn(now_s)
        return max(self._demand, 2 * max(self._half, self._half_before))

    # -- the book -----------------------------------------------------------------------------------------

    def is_idle(self, now_s: float) -> bool:
        """There is nothing to tell, and nothing that a new book would have to hear."""
        told = not (self._balance or self._in_use or self._open or self._told_holds or self._corrections)
        return told and now_s - self._active_s > MINUTE_S + HELD_S

    def ask(self, word: int, book: str, period: str, waiting: int, least: int, now_s: float) -> LeaseAsk:
        """What to say to the book of that name.

        Args:
            word: its number.
            waiting: what requests wait for now; the smallest of them needs ``least``.
        """
        self.expire(now_s)
        if period != self.period:
            self.period, self._balance = period, 0
            self._corrections.clear()
        want = max(0, max(self._expected(now_s), waiting) - self._balance)
        known = pace = None
        if book != self._book or not book:
            # Also if it is the first one: there is nothing to tell, and it need not ask for it.
            theirs_s = now_s + self._ahead_s
            known = tuple(
                (slot if isinstance(slot, str) else theirs_s - slot * SLOT_S, amount)
                for slot, amount in self._usage.slots.items()
            )
            pace = self._pace and LeasePace(self._pace.free, theirs_s - self._pace.at_s)
        self._told_holds = self._in_use + self._balance if self._places else 0
        asked = LeaseAsk(
            limit=self.limit,
            want=min(want, self.limit),
            need=waiting,
            least=least or self._least,
            refused=self._refused,
            corrections=self._corrections.tell(word, now_s, of_a_period=self._usage.period),
            unspent=0 if self._places else self._balance,
            word=word,
            answered=self._answered,
            holds=self._told_holds,
            heard=self._heard,
            period=period,
            base=self._base if period == self._base_of else 0,
            known=known,
            pace=pace,
        )
        self._demand, self._least, self._refused = 0, 0, False
        return asked

    def unheard(self, asked: LeaseAsk) -> None:
        """The book did not answer this, or is to be told more first."""
        self._refused |= asked.refused
        self._demand = max(self._demand, asked.want)

    def hear(self, asked: LeaseAsk, told: Told, answer: LeaseAnswer, now_s: float) -> None:
        """The book's answer."""
        self._processes = max(1, answer.processes)
        self._went_ahead, self._heard_s = 0, now_s
        self._answered = asked.word
        self._corrections.heard(asked.word)
        self._balance += told.given
        self._told = self._told or not answer.recovers
        self._places_used = told.used
        if told.given:
            self._leased_s = now_s
            self._active_s = max(self._active_s, now_s)
        # Who comes beyond a lease that was as large as was wanted may ask for more.
        self._dry_until_s = float("-inf")
        if is_short(asked, told.given):
            self._wait_s = told.wait_s
            # Of a small limit one is only given to a request that waits, and none would while there is said to be none.
            self._dry_until_s = now_s + (ASK_EVERY_S if told.wait_s > 0 else 0.0)
        if self._places or answer.recovers:
            return
        if answer.book != self._book:
            self._usage.slots.clear()
            self._book = answer.book
        self._helped.slots.clear()
        self._heard, self._ahead_s, self._pace = told.sequence, answer.now_s - now_s, told.pace
        # It goes on with the pace, if there is one, and with what is owed.
        self._own, self._own_s = (told.pace.free, told.pace.at_s - self._ahead_s) if told.pace else (0.0, now_s)
        self._usage.slots |= dict(told.changed)
        # Nobody says of what is older than a minute that it is.
        self._usage.used(answer.now_s, self.period)

    def lose(self) -> None:
        """The book has been silent for so long that it may have given these places to others."""
        if self._places:
            self._balance = 0

    def expire(self, now_s: float) -> None:
        """Give back what has lain unused."""
        if self._balance > 0 and now_s - self._leased_s > HELD_S:
            if not self._places:
                self._corrections.note(-self._balance, self._leased_s)
            self._balance = 0
