"""Which faults there will be: a pure function of the wish and its seed, known before anything is hit.

When the next one is due, and whom it hits, is settled at that moment by what the cluster is then: a pool that is
whole again, a list of processes by age. So the same seed gives the same faults, in the same order, at the same places.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from hycluster.errors import SettingsError, shown

T = TypeVar("T")
N = TypeVar("N", bound=StrEnum)


class FaultKind(StrEnum):
    """What is done to a process: SIGKILL; SIGSTOP for long; SIGSTOP for a moment."""

    KILL = "kill"
    STOP = "stop"
    DELAY = "delay"


class Where(StrEnum):
    """What is hit: any process of a replica; an ingress process; any other process that holds a gateway (batches, batch
    jobs)."""

    REPLICA = "replica"
    INGRESS = "ingress"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Pick:
    """Who is hit, as numbers from 0 to 1: how far down the list of those that could be, and of its processes."""

    target: float
    process: float


@dataclass(frozen=True, slots=True)
class Fault:
    """One moment of the schedule.

    Attributes:
        pause_s: after the pool is whole again, or after the fault before, as the wish says.
        picks: one for each to be hit.
    """

    number: int
    kind: FaultKind
    where: Where
    pause_s: float
    picks: tuple[Pick, ...]

    def choose(self, there: Sequence[T]) -> list[tuple[T, Pick]]:
        """Whom of ``there`` it hits: as many as it has picks, each once."""
        left = list(there)
        return [(left.pop(int(pick.target * len(left))), pick) for pick in self.picks[: len(left)]]


@dataclass(frozen=True, slots=True)
class FaultOptions:
    """What faults one wants.

    Attributes:
        count: faults in all.
        kinds, places: by kind and by place, its share of them.
        every_s: seconds between two faults; None is whenever the pool is whole again.
        together: so many replicas at the same moment, in one of the faults; 1 is never.
    """

    seed: int = 0
    count: int = 10
    kinds: Mapping[FaultKind, float] = field(default_factory=lambda: {FaultKind.KILL: 1.0})
    places: Mapping[Where, float] = field(default_factory=lambda: {Where.REPLICA: 1.0})
    every_s: float | None = None
    together: int = 1


# After the pool is whole again: long enough to have work on all replicas, and not always the same moment of it.
PAUSE_S = 1.0, 3.0


def schedule(wish: FaultOptions) -> list[Fault]:
    """The faults of a wish, in their order."""
    draw = random.Random(wish.seed)
    kinds, places = _shares(wish.kinds, wish.count), _shares(wish.places, wish.count)
    draw.shuffle(kinds)
    draw.shuffle(places)
    on_replicas = [number for number, where in enumerate(places) if where is Where.REPLICA]
    many = draw.choice(on_replicas) if wish.together > 1 and on_replicas else None
    return [
        Fault(
            number=number,
            kind=kind,
            where=where,
            pause_s=draw.uniform(*PAUSE_S) if wish.every_s is None else wish.every_s,
            picks=tuple(Pick(draw.random(), draw.random()) for _ in range(wish.together if number == many else 1)),
        )
        for number, (kind, where) in enumerate(zip(kinds, places, strict=True))
    ]


def _shares(weights: Mapping[T, float], count: int) -> list[T]:
    """``count`` things, each as often as its weight says; what is left over goes to those that lack most."""
    total = sum(weights.values())
    exact = {thing: count * weight / total for thing, weight in weights.items()}
    whole = {thing: int(share) for thing, share in exact.items()}
    lacking = sorted(exact, key=lambda thing: whole[thing] - exact[thing])
    for thing in lacking[: count - sum(whole.values())]:
        whole[thing] += 1
    return [thing for thing, times in whole.items() for _ in range(times)]


def weights(option: str, text: str, kind: type[N]) -> dict[N, float]:
    """``kill=3,stop=1`` as a mapping; a name alone weighs 1.

    Raises:
        SettingsError: a name that is none of ``kind``, or a weight that is no positive number.
    """
    found: dict[N, float] = {}
    for part in filter(None, (word.strip() for word in text.split(","))):
        name, _, number = part.partition("=")
        try:
            weight = float(number or 1)
        except ValueError:
            weight = -1
        if name not in list(kind) or not 0 < weight < float("inf"):
            raise SettingsError(
                f"{option}: {shown(part)} is not allowed; must be NAME or NAME=WEIGHT, with a NAME of"
                f" {', '.join(kind)} and a WEIGHT above 0"
            )
        found[kind(name)] = weight
    if not found:
        raise SettingsError(f"{option}: must name one or more of {', '.join(kind)}")
    return found


def pause(text: str) -> float | None:
    """``whole`` as None, ``10s`` as seconds.

    Raises:
        SettingsError: it is neither.
    """
    if text == "whole":
        return None
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        seconds = -1
    if not 0 < seconds < float("inf"):
        raise SettingsError(f"--every: {shown(text)} is not allowed; must be 'whole', or seconds such as '10s'")
    return seconds
