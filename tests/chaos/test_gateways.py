from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import httpx
from prometheus_client import CollectorRegistry, generate_latest

from hycluster.chaos.gateways import Gateways
from hycluster.observe import failover
from hycluster.observe.failover import FailoverMetrics


class Door:
    """What a scrape of a door reads."""

    def __init__(self, gateway_id: str) -> None:
        self.gateway_id, self.carried = gateway_id, failover.Carried()
        self._registry = CollectorRegistry()
        metrics = FailoverMetrics()
        self._registry.register(metrics)
        metrics.watch("m", self)

    def page(self) -> str:
        return "# TYPE others counter\nothers_total 1.0\n" + generate_latest(self._registry).decode()

    def carry(self, tokens: int) -> None:
        self.carried.lost("r", 0.0)
        self.carried.moved(tokens)


async def test_all_doors_behind_one_port_are_added_up() -> None:
    doors = [Door("a"), Door("b")]
    turn: Iterator[Door] = cycle(doors)
    doors[0].carry(1000)

    def scrape(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=next(turn).page())

    async with httpx.AsyncClient(transport=httpx.MockTransport(scrape)) as client:
        gateways = Gateways(client, "http://door", "m", 2)
        await gateways.begin()
        for door in doors:
            door.carry(10)
        doors[0].carried.went_on("r")
        found = await gateways.end()
    assert found is not None
    assert (found.requests, found.tokens_recomputed) == (2, 20)
    # Since second 0 of this machine's clock, which is beyond all buckets.
    assert found.pauses == {float("inf"): 1}
    assert found.pause_s(0.5) == float("inf")


async def test_doors_that_do_not_count() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text="others_total 1.0\n"))
    async with httpx.AsyncClient(transport=transport) as client:
        gateways = Gateways(client, "http://door", "m", 1)
        await gateways.begin()
        assert await gateways.end() is None
