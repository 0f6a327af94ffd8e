"""What must be remembered of every shard, in bits and bytes: a job of 10^7 rows has tens of thousands of shards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, MutableSet

ATTEMPT_BYTES = 6
NO_ATTEMPT = bytes(ATTEMPT_BYTES)
_NAME = re.compile(r"part-(\d{8,})-([0-9a-f]{12})\.parquet")


class ShardSet(MutableSet[int]):
    """A set of shard numbers, a bit each; iterates in order."""

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._bits = bytearray()
        self._count = 0
        for number in numbers:
            self.add(number)

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int) or not 0 <= number >> 3 < len(self._bits):
            return False
        return bool(self._bits[number >> 3] & 1 << (number & 7))

    def __iter__(self) -> Iterator[int]:
        for place, bits in enumerate(self._bits):
            if bits:
                yield from (8 * place + bit for bit in range(8) if bits & 1 << bit)

    def __len__(self) -> int:
        return self._count

    def add(self, value: int) -> None:
        if value in self:
            return
        if value < 0:
            raise ValueError(f"a shard's number is not negative: {value}")
        missing = (value >> 3) + 1 - len(self._bits)
        if missing > 0:
            self._bits.extend(bytes(missing))
        self._bits[value >> 3] |= 1 << (value & 7)
        self._count += 1

    def discard(self, value: int) -> None:
        if value in self:
            self._bits[value >> 3] &= ~(1 << (value & 7))
            self._count -= 1


class PartNames:
    """Names ``part-<shard>-<attempt>.parquet``, a few bytes each as long as there is one a shard.

    A second one of a shard, and what is not of that form, is kept as it is.

    Args:
        shards: of the plan.
    """

    def __init__(self, shards: int) -> None:
        self._attempts = bytearray(ATTEMPT_BYTES * shards)
        self._others: set[str] = set()

    def add(self, name: str) -> None:
        place, attempt = self._place(name)
        if place is None or attempt == NO_ATTEMPT or self._attempts[place] not in (NO_ATTEMPT, attempt):
            self._others.add(name)
        else:
            self._attempts[place] = attempt

    def __contains__(self, name: str) -> bool:
        place, attempt = self._place(name)
        return (place is not None and self._attempts[place] == attempt != NO_ATTEMPT) or name in self._others

    def _place(self, name: str) -> tuple[slice | None, bytes]:
        """Where the attempt of a name belongs, None if there is no place for it."""
        match = _NAME.fullmatch(name)
        if match is None or (int(match[1]) + 1) * ATTEMPT_BYTES > len(self._attempts):
            return None, NO_ATTEMPT
        begin = int(match[1]) * ATTEMPT_BYTES
        return slice(begin, begin + ATTEMPT_BYTES), bytes.fromhex(match[2])
