"""What the gateways say of migrated requests: their counters under ``/metrics``, added up over all ingress processes.

A look reads those of all that share the address; behind a load balancer it meets one address after the other. An
ingress process that was killed is counted up to the last look before; one that was not there at the start began at
zero.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

LOOK_EVERY_S = 0.5
# Looks in which every ingress process is met almost surely, times the number of ingress processes.
LOOKS_PER_INGRESS_PROCESS = 25
_MIGRATED, _TOKENS = "hycluster_requests_migrated_total", "hycluster_tokens_recomputed_total"
_PAUSES = "hycluster_migration_pause_seconds_bucket"
_Series = tuple[str, float]


@dataclass(frozen=True, slots=True)
class MigrationTotals:
    """Of all gateways, over the run.

    Attributes:
        pauses: how many were at most so many seconds long and longer than the bound before.
    """

    requests: int
    tokens_recomputed: int
    pauses: dict[float, int]

    def pause_s(self, quantile: float) -> float | None:
        """The bound at or below which that share of the pauses is; right to the width of a bucket."""
        total, below = sum(self.pauses.values()), 0
        for bound, count in sorted(self.pauses.items()):
            below += count
            if below and below >= quantile * total:
                return bound
        return None


@dataclass(slots=True)
class Gateways:
    """The counters of one model's gateways, read while the run goes on."""

    client: httpx.AsyncClient
    http: str
    model: str
    ingresses: int
    _first: dict[str, Counter[_Series]] = field(default_factory=dict)
    _last: dict[str, Counter[_Series]] = field(default_factory=dict)

    async def begin(self) -> None:
        """What they count before the run."""
        self._first = await self._all()

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            with contextlib.suppress(httpx.HTTPError):
                self._last |= await self._look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def end(self) -> MigrationTotals | None:
        """What they have counted since; None if the ingress processes have no such counters."""
        self._last |= await self._all()
        if not self._last:
            return None
        total: Counter[_Series] = Counter()
        for gateway, counts in self._last.items():
            total += counts - self._first.get(gateway, Counter())
        cumulative = sorted((bound, count) for (name, bound), count in total.items() if name == _PAUSES)
        pauses, below = {}, 0.0
        for bound, count in cumulative:
            pauses[bound], below = int(count - below), count
        return MigrationTotals(
            int(total[_MIGRATED, 0.0]),
            int(total[_TOKENS, 0.0]),
            {bound: count for bound, count in pauses.items() if count},
        )

    async def _all(self) -> dict[str, Counter[_Series]]:
        """Of every ingress process that there is, as well as chance lets it."""
        found: dict[str, Counter[_Series]] = {}
        for _ in range(LOOKS_PER_INGRESS_PROCESS * self.ingresses):
            with contextlib.suppress(httpx.HTTPError):
                found |= await self._look()
            if len(found) >= self.ingresses:
                break
        return found

    async def _look(self) -> dict[str, Counter[_Series]]:
        text = (await self.client.get(f"{self.http}/metrics", timeout=10)).text
        ours = "\n".join(line for line in text.splitlines() if "hycluster_" in line)
        found: dict[str, Counter[_Series]] = defaultdict(Counter)
        for family in text_string_to_metric_families(ours + "\n"):
            for sample in family.samples:
                if sample.name in (_MIGRATED, _TOKENS, _PAUSES) and sample.labels.get("model") == self.model:
                    series = sample.name, float(sample.labels.get("le", 0))
                    found[sample.labels["ingress"]][series] = sample.value  # type: ignore[assignment]  # counts, as floats
        return found
