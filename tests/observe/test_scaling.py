from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from hycluster.directory.autoscaling import Scaling
from hycluster.observe.catalogue import INGRESS
from hycluster.observe.scaling import ScalingMetrics


class Gateway(SimpleNamespace):
    engine_core: Any
    cold_start: Any


def gateway(scaling: Scaling | None) -> Gateway:
    return Gateway(
        engine_core=SimpleNamespace(shows_pool=True, requests_waiting=3), cold_start=SimpleNamespace(scaling=scaling)
    )


def shown(metrics: ScalingMetrics) -> dict[str, float]:
    """Series and values as a scrape reads them."""
    registry = CollectorRegistry()
    registry.register(metrics)
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_what_a_scrape_reads() -> None:
    metrics, of_m = ScalingMetrics(), gateway(Scaling(2, 1, 3.0, 40.5, {"wake": 4, "quiet": 1}))
    # Of this one nothing has been heard yet.
    of_n = gateway(None)
    metrics.watch("m", of_m)
    metrics.watch("n", of_n)
    assert shown(metrics) == {
        'hycluster_replicas_target{model="m"}': 2,
        'hycluster_replicas_running{model="m"}': 1,
        'hycluster_cold_start_seconds{model="m"}': 40.5,
        'hycluster_scaling_decisions_total{cause="wake",model="m"}': 4,
        'hycluster_scaling_decisions_total{cause="quiet",model="m"}': 1,
        f'hycluster_requests_without_replica{{ingress="{INGRESS}",model="m"}}': 3,
        f'hycluster_requests_without_replica{{ingress="{INGRESS}",model="n"}}': 3,
    }


def test_a_closed_gateway_is_shown_no_more() -> None:
    metrics = ScalingMetrics()
    metrics.watch("m", gateway(None))
    gc.collect()
    assert shown(metrics) == {}
