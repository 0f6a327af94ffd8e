"""What was given of a limit, and when."""

from __future__ import annotations

from dataclasses import dataclass, field

MINUTE_S = 60.0
SLOT_S = 0.25
# What a process has is used up to a second later than it was given.
WINDOW_S = 59.1
# So little may have been used before a burst began.
BEFORE_BURST = 0.02

# A stretch of time by its number, or a day or month by its name.
Slot = int | str


@dataclass(slots=True)
class SlotUsage:
    """What was given, by slots of time.

    Args:
        period: whether slots are days or months, which their names tell; else what is older than a minute is forgotten.
    """

    period: bool
    slots: dict[Slot, int] = field(default_factory=dict)

    def used(self, now_s: float, period: str = "", *, lately_s: float = WINDOW_S) -> int:
        """So lately, or within the period."""
        if self.period:
            return self.slots.get(period, 0)
        self.slots = {slot: amount for slot, amount in self.slots.items() if _ends_s(slot, MINUTE_S) > now_s}
        return sum(amount for slot, amount in self.slots.items() if _ends_s(slot, lately_s) > now_s)

    def note(self, amount: int, now_s: float, period: str = "") -> Slot:
        """Count what is given now; returns where."""
        slot: Slot = period if self.period else int(now_s // SLOT_S)
        self.slots[slot] = self.slots.get(slot, 0) + amount
        return slot

    def take_back(self, amount: int, now_s: float, period: str = "", age_s: float = 0.0) -> list[Slot]:
        """Count it no more: what was given so long ago, or else after that, or else before; returns where."""
        if self.period:
            self.slots[period] = max(0, self.slots.get(period, 0) - amount)
            return [period]
        given = int((now_s - age_s) // SLOT_S)
        numbers = sorted(slot for slot in self.slots if isinstance(slot, int))
        changed: list[Slot] = []
        for slot in (*(each for each in numbers if each >= given), *(each for each in numbers[::-1] if each < given)):
            part = min(amount, self.slots[slot])
            self.slots[slot] -= part
            amount -= part
            changed.append(slot)
            if not amount:
                break
        return changed

    def until_free_s(self, amount: int, limit: int, now_s: float) -> float:
        """Seconds until so much is free, if nothing more is given meanwhile."""
        over = self.used(now_s) + amount - limit
        for slot in sorted(slot for slot in self.slots if _ends_s(slot) > now_s):
            if over <= 0:
                break
            over -= self.slots[slot]
            if over <= 0:
                return _ends_s(slot) - now_s
        return 0.0

    def began_s(self, now_s: float) -> float:
        """When what was used within the last minute began to be, but for what is not worth it."""
        slots = sorted(slot for slot in self.slots if isinstance(slot, int))
        little = BEFORE_BURST * sum(self.slots.values())
        for slot in slots:
            little -= self.slots[slot]
            if little < 0:
                return min(now_s, slot * SLOT_S)
        return now_s


def _ends_s(slot: Slot, lately_s: float = WINDOW_S) -> float:
    """When what was given in a slot is so long ago."""
    assert isinstance(slot, int)
    return (slot + 1) * SLOT_S + lately_s
