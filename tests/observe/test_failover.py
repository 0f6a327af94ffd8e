from __future__ import annotations

import gc
import time
from types import SimpleNamespace

from prometheus_client import CollectorRegistry, generate_latest

from hycluster.observe.catalogue import INGRESS
from hycluster.observe.failover import PAUSE_BUCKETS_S, FailoverMetrics, Migrations


class Pool(SimpleNamespace):
    migrated: Migrations


def shown(metrics: FailoverMetrics) -> dict[str, float]:
    """Series and values as a scrape reads them."""
    registry = CollectorRegistry()
    registry.register(metrics)
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_what_a_scrape_reads() -> None:
    metrics, migrated = FailoverMetrics(), Migrations()
    pool = Pool(migrated=migrated)
    metrics.watch("m", pool)
    lost_s = time.monotonic() - 2.0
    migrated.lost("a", lost_s)
    migrated.moved(30)
    # Its next replica dies too, before it says a word: still the same pause.
    migrated.lost("a", time.monotonic())
    migrated.moved(0)
    migrated.went_on("a")
    most_s = time.monotonic() - lost_s
    migrated.went_on("never lost")
    migrated.lost("b", time.monotonic() - 2.0)
    migrated.ended("b")
    migrated.went_on("b")
    series = shown(metrics)
    labels = f'{{ingress="{INGRESS}",model="m"}}'
    assert series["hycluster_requests_migrated_total" + labels] == 2
    assert series["hycluster_tokens_recomputed_total" + labels] == 30
    assert series["hycluster_migration_pause_seconds_count" + labels] == 1
    assert 2 <= series["hycluster_migration_pause_seconds_sum" + labels] <= most_s
    bound = next(bound for bound in PAUSE_BUCKETS_S if bound > most_s)
    assert series[f'hycluster_migration_pause_seconds_bucket{{ingress="{INGRESS}",le="{bound}",model="m"}}'] == 1
    assert series[f'hycluster_migration_pause_seconds_bucket{{ingress="{INGRESS}",le="0.05",model="m"}}'] == 0


def test_a_closed_gateway_is_shown_no_more() -> None:
    metrics = FailoverMetrics()
    pool = Pool(migrated=Migrations())
    metrics.watch("m", pool)
    assert shown(metrics)
    del pool
    gc.collect()
    assert shown(metrics) == {}
