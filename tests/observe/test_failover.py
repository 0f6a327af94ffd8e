from __future__ import annotations

import gc
import time
from types import SimpleNamespace

from prometheus_client import CollectorRegistry, generate_latest

from hycluster.observe.failover import PAUSE_BUCKETS_S, Carried, FailoverMetrics


class Pool(SimpleNamespace):
    gateway_id: str
    carried: Carried


def shown(metrics: FailoverMetrics) -> dict[str, float]:
    """Series and values as a scrape reads them."""
    registry = CollectorRegistry()
    registry.register(metrics)
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_what_a_scrape_reads() -> None:
    metrics, carried = FailoverMetrics(), Carried()
    pool = Pool(gateway_id="g", carried=carried)
    metrics.watch("m", pool)
    carried.lost("a", time.monotonic() - 2.0)
    carried.moved(30)
    # Its next replica dies too, before it says a word: still the same pause.
    carried.lost("a", time.monotonic())
    carried.moved(0)
    carried.went_on("a")
    carried.went_on("never lost")
    carried.lost("b", time.monotonic() - 2.0)
    carried.ended("b")
    carried.went_on("b")
    series = shown(metrics)
    labels = '{gateway="g",model="m"}'
    assert series["hycluster_requests_carried_total" + labels] == 2
    assert series["hycluster_tokens_recomputed_total" + labels] == 30
    assert series["hycluster_carried_pause_seconds_count" + labels] == 1
    assert 2 <= series["hycluster_carried_pause_seconds_sum" + labels] < 3
    bound = next(bound for bound in PAUSE_BUCKETS_S if bound > 3)
    assert series[f'hycluster_carried_pause_seconds_bucket{{gateway="g",le="{bound}",model="m"}}'] == 1
    assert series['hycluster_carried_pause_seconds_bucket{gateway="g",le="0.05",model="m"}'] == 0


def test_a_closed_gateway_is_shown_no_more() -> None:
    metrics = FailoverMetrics()
    pool = Pool(gateway_id="g", carried=Carried())
    metrics.watch("m", pool)
    assert shown(metrics)
    del pool
    gc.collect()
    assert shown(metrics) == {}
