from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from hycluster.observe.catalogue import INGRESS
from hycluster.observe.gateways import GatewayMetrics, KnownReplica, ReplicaBooks
from hycluster.pool_health import PoolHealth, StartTrouble
from hycluster.traffic import GatewayTraffic


class Gateway(SimpleNamespace):
    traffic: GatewayTraffic
    engine_core: Any
    health: PoolHealth


def gateway() -> Gateway:
    pool = SimpleNamespace(
        shows_pool=True,
        replicas_lost=2,
        known=[KnownReplica(0, "gone", routed=5, gone=True), KnownReplica(1, "r", routed=7)],
        books=[ReplicaBooks("r", 3, 120, 1.5)],
    )
    health = PoolHealth(1, 2, trouble=StartTrouble(4, "EngineStartFailed", "no memory", 0.0))
    traffic = GatewayTraffic()
    for _ in range(6):
        traffic.online.refuse("overloaded")
    traffic.online.cancel(3)
    traffic.batch.refuse("overloaded")
    traffic.batch.fail("KillsReplicas")
    return Gateway(traffic=traffic, engine_core=pool, health=health)


def shown(metrics: GatewayMetrics) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(metrics)
    lines = generate_latest(registry).decode().replace(INGRESS, "me").splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


OWN = {
    # Those that never were, too: a query over them must say 0.
    'hycluster_requests_refused_total{ingress="me",model="m",priority="batch",reason="overloaded"}': 1,
    'hycluster_requests_refused_total{ingress="me",model="m",priority="online",reason="overloaded"}': 6,
    'hycluster_requests_refused_total{ingress="me",model="m",priority="batch",reason="unavailable"}': 0,
    'hycluster_requests_refused_total{ingress="me",model="m",priority="online",reason="unavailable"}': 0,
    'hycluster_requests_failed_total{ingress="me",model="m",priority="batch",reason="ReplicaLost"}': 0,
    'hycluster_requests_failed_total{ingress="me",model="m",priority="online",reason="ReplicaLost"}': 0,
    'hycluster_requests_failed_total{ingress="me",model="m",priority="batch",reason="KillsReplicas"}': 1,
    'hycluster_requests_failed_total{ingress="me",model="m",priority="online",reason="KillsReplicas"}': 0,
    'hycluster_requests_failed_total{ingress="me",model="m",priority="batch",reason="RequestFailed"}': 0,
    'hycluster_requests_failed_total{ingress="me",model="m",priority="online",reason="RequestFailed"}': 0,
    'hycluster_requests_failed_total{ingress="me",model="m",priority="batch",reason="Unavailable"}': 0,
    'hycluster_requests_failed_total{ingress="me",model="m",priority="online",reason="Unavailable"}': 0,
    'hycluster_requests_cancelled_total{ingress="me",model="m",priority="batch"}': 0,
    'hycluster_requests_cancelled_total{ingress="me",model="m",priority="online"}': 3,
    'hycluster_replicas_lost_total{ingress="me",model="m"}': 2,
    'hycluster_replicas_connected{ingress="me",model="m"}': 1,
    # What was sent to one that is gone was sent.
    'hycluster_requests_routed_total{ingress="me",model="m",replica="gone"}': 5,
    'hycluster_requests_routed_total{ingress="me",model="m",replica="r"}': 7,
    'hycluster_requests_in_flight{ingress="me",model="m",replica="r"}': 3,
    'hycluster_outstanding_tokens{ingress="me",model="m",replica="r"}': 120,
    'hycluster_replica_silent_seconds{ingress="me",model="m",replica="r"}': 1.5,
}
POOLS = {
    'hycluster_replicas_ready{model="m"}': 1,
    'hycluster_replicas_wanted{model="m"}': 2,
    'hycluster_replica_failed_starts{model="m"}': 4,
}


def test_what_a_scrape_reads() -> None:
    metrics, of_m = GatewayMetrics(), gateway()
    metrics.watch("m", of_m)
    assert shown(metrics) == OWN | POOLS
    of_m.engine_core.shows_pool = False
    assert shown(metrics) == OWN


def test_a_closed_gateway_is_shown_no_more() -> None:
    metrics, of_m = GatewayMetrics(), gateway()
    metrics.watch("m", of_m)
    del of_m
    gc.collect()
    assert shown(metrics) == {}
