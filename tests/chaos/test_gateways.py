from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import httpx
from prometheus_client import CollectorRegistry, generate_latest

from hycluster.chaos.gateways import Gateways
from hycluster.observe import failover
from hycluster.observe.catalogue import INGRESS
from hycluster.observe.failover import FailoverMetrics


class Ingress:
    """What a scrape of an ingress process reads."""

    def __init__(self, name: str) -> None:
        self._name, self.migrated = name, failover.Migrations()
        self._registry = CollectorRegistry()
        metrics = FailoverMetrics()
        self._registry.register(metrics)
        metrics.watch("m", self)

    def page(self) -> str:
        ours = generate_latest(self._registry).decode().replace(INGRESS, self._name)
        return "# TYPE others counter\nothers_total 1.0\n" + ours

    def carry(self, tokens: int) -> None:
        self.migrated.lost("r", 0.0)
        self.migrated.moved(tokens)


async def test_all_ingress_processes_behind_one_port_are_added_up() -> None:
    ingresses = [Ingress("a"), Ingress("b")]
    turn: Iterator[Ingress] = cycle(ingresses)
    ingresses[0].carry(1000)

    def scrape(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=next(turn).page())

    async with httpx.AsyncClient(transport=httpx.MockTransport(scrape)) as client:
        gateways = Gateways(client, "http://ingress", "m", 2)
        await gateways.begin()
        for ingress in ingresses:
            ingress.carry(10)
        ingresses[0].migrated.went_on("r")
        found = await gateways.end()
    assert found is not None
    assert (found.requests, found.tokens_recomputed) == (2, 20)
    # Since second 0 of this machine's clock, which is beyond all buckets.
    assert found.pauses == {float("inf"): 1}
    assert found.pause_s(0.5) == float("inf")


async def test_ingress_processes_that_do_not_count() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text="others_total 1.0\n"))
    async with httpx.AsyncClient(transport=transport) as client:
        gateways = Gateways(client, "http://ingress", "m", 1)
        await gateways.begin()
        assert await gateways.end() is None
