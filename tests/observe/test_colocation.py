from __future__ import annotations

import gc
from types import SimpleNamespace

from prometheus_client import CollectorRegistry, generate_latest

from hycluster.core import BulkDemand, ColocationLoad, ReplicaLoad
from hycluster.observe.colocation import ColocationMetrics


class Pool(SimpleNamespace):
    shows_pool: bool
    colocation_loads: dict[str, ColocationLoad]
    jobs: dict[str, dict[str, BulkDemand]]
    gone_loads: dict[str, ReplicaLoad]


def scraped(metrics: ColocationMetrics) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(metrics)
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_what_a_scrape_reads() -> None:
    metrics = ColocationMetrics()
    load = ColocationLoad(
        parked=3, given_up=2, bulk_tokens=50, online_tokens=70, predicted_step_s=0.25, real_step_s=0.5,
        step_time_s=(0.1, 0.01, 0.02, 0.0),
    )  # fmt: skip
    jobs = {"g": {"a": BulkDemand(3, urgent_at=90.0)}, "h": {"a": BulkDemand(4, urgent_at=80.0), "b": BulkDemand(1)}}
    gone = {
        "r0": ReplicaLoad(colocation=ColocationLoad(parked=9, given_up=1, bulk_tokens=5, online_tokens=7)),
        # One that came back goes on counting.
        "r1": ReplicaLoad(colocation=ColocationLoad(given_up=1)),
        "older": ReplicaLoad(),
    }
    pool = Pool(shows_pool=True, colocation_loads={"r1": load}, jobs=jobs, gone_loads=gone)
    metrics.watch("m", pool)
    assert scraped(metrics) == {
        'hycluster_batch_rows_parked{model="m",replica="r1"}': 3,
        'hycluster_batch_rows_preempted_total{model="m",replica="r1"}': 2,
        'hycluster_engine_tokens_total{model="m",priority="online",replica="r1"}': 70,
        'hycluster_engine_tokens_total{model="m",priority="batch",replica="r1"}': 50,
        # What one that is gone had counted stays, what it was like does not.
        'hycluster_batch_rows_preempted_total{model="m",replica="r0"}': 1,
        'hycluster_engine_tokens_total{model="m",priority="online",replica="r0"}': 7,
        'hycluster_engine_tokens_total{model="m",priority="batch",replica="r0"}': 5,
        'hycluster_engine_step_seconds{kind="measured",model="m",replica="r1"}': 0.5,
        'hycluster_engine_step_seconds{kind="predicted",model="m",replica="r1"}': 0.25,
        'hycluster_engine_step_coefficient_seconds{model="m",replica="r1",term="base"}': 0.1,
        'hycluster_engine_step_coefficient_seconds{model="m",replica="r1",term="prefill_token"}': 0.01,
        'hycluster_engine_step_coefficient_seconds{model="m",replica="r1",term="sequence"}': 0.02,
        'hycluster_engine_step_coefficient_seconds{model="m",replica="r1",term="kv_token"}': 0.0,
        # One job, which two gateways feed.
        'hycluster_job_rows_in_flight{batch_job="a",model="m"}': 7,
        'hycluster_job_rows_in_flight{batch_job="b",model="m"}': 1,
        'hycluster_job_late_deadline_timestamp_seconds{batch_job="a",model="m"}': 80,
    }
    # Another ingress process shows it.
    pool.shows_pool = False
    assert scraped(metrics) == {}


def test_a_closed_pool_is_shown_no_more() -> None:
    metrics = ColocationMetrics()
    pool = Pool(shows_pool=True, colocation_loads={"r1": ColocationLoad()}, jobs={}, gone_loads={})
    metrics.watch("m", pool)
    assert scraped(metrics)
    del pool
    gc.collect()
    assert scraped(metrics) == {}
