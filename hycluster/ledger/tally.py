"""What projects have had of one process since it began, for ``/metrics``: of a bounded number of them by name."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal

from hycluster.ledger.entry import Entry

# An identity provider may know any number of projects; each is a dozen series in whatever reads them.
MOST_PROJECTS = 100
# One that has asked nothing for so long gives its place to another one.
IDLE_AFTER_S = 3600.0
# No name begins so.
OTHER = ("_other", "_other")


@dataclass(slots=True)
class ProjectUsage:
    """What one project has had.

    Attributes:
        requests: by outcome.
        computed_tokens: of its prompts, those that the KV cache did not have; ``cached_tokens`` are those that it had.
        asked_s: when it last did, by the tally's clock.
    """

    requests: Counter[str] = field(default_factory=Counter)
    computed_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost: Decimal = Decimal(0)
    asked_s: float = 0.0


class ProjectTally:
    """Args:
    clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._projects: dict[tuple[str, str], ProjectUsage] = {}

    def count(self, entry: Entry) -> None:
        """A line was written. Sums only grow: who comes late has been among the others until then."""
        usage = self._of((entry.tenant, entry.project))
        usage.requests[entry.outcome] += entry.requests
        usage.computed_tokens += entry.input_tokens - entry.cached_tokens
        usage.cached_tokens += entry.cached_tokens
        usage.output_tokens += entry.output_tokens
        usage.cost += entry.cost

    def __iter__(self) -> Iterator[tuple[tuple[str, str], ProjectUsage]]:
        """By tenant and project."""
        return iter(list(self._projects.items()))

    def _of(self, owner: tuple[str, str]) -> ProjectUsage:
        now_s = self._clock()
        if owner not in self._projects:
            named = self._projects.keys() - {OTHER}
            if len(named) >= MOST_PROJECTS:
                idle = min(named, key=lambda one: self._projects[one].asked_s)
                if now_s - self._projects[idle].asked_s < IDLE_AFTER_S:
                    owner = OTHER
                else:
                    del self._projects[idle]
        usage = self._projects.setdefault(owner, ProjectUsage())
        usage.asked_s = now_s
        return usage
