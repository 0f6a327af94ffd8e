from __future__ import annotations

import gc
from types import SimpleNamespace

from prometheus_client import CollectorRegistry, generate_latest

from hycluster.core import ExpertLoad
from hycluster.observe.experts import ExpertMetrics


class Pool(SimpleNamespace):
    shows_pool: bool
    expert_loads: dict[str, ExpertLoad]


def shown(metrics: ExpertMetrics) -> dict[str, float]:
    """Series and values as a scrape reads them."""
    registry = CollectorRegistry()
    registry.register(metrics)
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_what_a_scrape_reads() -> None:
    metrics = ExpertMetrics()
    pool = Pool(shows_pool=True, expert_loads={"r1": ExpertLoad(tokens=(30, 10), moved=4, skew=1.5, rank_skew=1.25)})
    metrics.watch("m", pool)
    assert shown(metrics) == {
        'hycluster_expert_tokens_total{expert="0",model="m",replica="r1"}': 30,
        'hycluster_expert_tokens_total{expert="1",model="m",replica="r1"}': 10,
        'hycluster_expert_moved_tokens_total{model="m",replica="r1"}': 4,
        'hycluster_expert_moved_ratio{model="m",replica="r1"}': 0.1,
        'hycluster_expert_load_skew_ratio{model="m",replica="r1"}': 1.5,
        'hycluster_expert_rank_load_skew_ratio{model="m",replica="r1"}': 1.25,
    }


def test_without_ranks_no_rank_is_shown() -> None:
    metrics = ExpertMetrics()
    pool = Pool(shows_pool=True, expert_loads={"r1": ExpertLoad(tokens=(0, 0))})
    metrics.watch("m", pool)
    assert not [series for series in shown(metrics) if "rank" in series]
    assert shown(metrics)['hycluster_expert_moved_ratio{model="m",replica="r1"}'] == 0


def test_nothing_is_shown_where_nothing_is_counted() -> None:
    metrics = ExpertMetrics()
    pool = Pool(shows_pool=True, expert_loads={})
    metrics.watch("m", pool)
    assert shown(metrics) == {}


def test_a_closed_pool_is_shown_no_more() -> None:
    metrics = ExpertMetrics()
    pool = Pool(shows_pool=True, expert_loads={"r1": ExpertLoad(tokens=(1,))})
    metrics.watch("m", pool)
    assert shown(metrics)
    del pool
    gc.collect()
    assert shown(metrics) == {}
