from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from hycluster.core import ExpertLoad
from hycluster.errors import SettingsError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from hycluster.engine import expert_load
    from hycluster.engine.expert_load import READ_EVERY_S, ExpertLoadMeter, by_rank, expert_load_meter, skew
    from hycluster.models.routing import LayerCounts


def test_the_first_reading_is_the_zero_point() -> None:
    meter = ExpertLoadMeter(None)
    meter.take([{0: LayerCounts([5, 5], 1), 1: LayerCounts([9, 1], 0)}])
    assert meter.load == ExpertLoad(tokens=(0, 0))
    meter.take([{0: LayerCounts([8, 6], 3), 1: LayerCounts([9, 5], 0)}])
    assert meter.load == ExpertLoad(tokens=(3, 5), moved=2, skew=(3 + 4) / (2 + 2))


def test_tensor_parallel_workers_count_once_and_pipeline_stages_add() -> None:
    meter = ExpertLoadMeter(None)
    for n in (0, 6):
        meter.take([{0: LayerCounts([n, 0], n)}, {0: LayerCounts([n, 0], n)}, {1: LayerCounts([0, n], 0)}])
    assert meter.load is not None
    assert (meter.load.tokens, meter.load.moved) == ((6, 6), 6)


def test_idle_time_keeps_the_last_skew() -> None:
    meter = ExpertLoadMeter(2)
    meter.take([{0: LayerCounts([0, 0, 0, 0], 0)}])
    meter.take([{0: LayerCounts([6, 0, 1, 1], 0)}])
    busy = meter.load
    meter.take([{0: LayerCounts([6, 0, 1, 1], 0)}])
    assert meter.load == busy == ExpertLoad(tokens=(6, 0, 1, 1), skew=3.0, rank_skew=1.5)


def test_skew_is_of_the_load_since_the_last_reading() -> None:
    meter = ExpertLoadMeter(None)
    for tokens in ([0, 0], [100, 0], [100, 7]):
        meter.take([{0: LayerCounts(tokens, 0)}])
    assert meter.load is not None
    assert (meter.load.tokens, meter.load.skew) == ((100, 7), 2.0)


@pytest.mark.parametrize(("layers", "expected"), [([], 1.0), ([[0, 0]], 1.0), ([[4, 4]], 1.0), ([[8, 0], [4, 4]], 1.5)])
def test_skew(layers: list[list[int]], expected: float) -> None:
    assert skew(layers) == expected


def test_experts_lie_on_ranks_as_vllm_places_them() -> None:
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    for experts, ranks in ((16, 4), (16, 16), (10, 4), (7, 3)):
        tokens = [1 << e for e in range(experts)]
        expected = []
        for rank in range(ranks):
            _, expert_map, _ = determine_expert_map(ranks, rank, experts)
            assert expert_map is not None
            expected.append(sum(t for t, local in zip(tokens, expert_map.tolist(), strict=True) if local >= 0))
        assert by_rank(tokens, ranks) == expected


def test_a_reading_is_due_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1.0)
    monkeypatch.setattr(expert_load, "time", SimpleNamespace(monotonic=lambda: clock.now))
    meter = ExpertLoadMeter(None)
    assert [meter.due(), meter.due()] == [True, False]
    clock.now += READ_EVERY_S
    assert [meter.due(), meter.due()] == [True, False]


def engine(routing: dict[str, Any], layers: int, **parallel: Any) -> tuple[Any, Any]:
    config = SimpleNamespace(
        additional_config={"hycluster": {"routing": routing}},
        model_config=SimpleNamespace(served_model_name="m"),
        parallel_config=SimpleNamespace(
            **{
                "enable_expert_parallel": False,
                "enable_eplb": False,
                "tensor_parallel_size": 1,
                "data_parallel_size": 1,
            }
            | parallel
        ),
    )
    return config, SimpleNamespace(collective_rpc=lambda f: [layers])


def test_routing_settings_that_nothing_heeds_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"models: m: routing: is not for this model"):
        expert_load_meter(*engine({"recycle": {}}, layers=0))


def test_no_meter_where_none_is_asked_for() -> None:
    assert expert_load_meter(*engine({}, layers=0)) is None
    assert expert_load_meter(*engine({"recycle": {}}, layers=2)) is None


@pytest.mark.parametrize(
    ("parallel", "ranked"),
    [
        ({}, False),
        ({"enable_expert_parallel": True, "tensor_parallel_size": 2, "data_parallel_size": 2}, True),
        ({"enable_expert_parallel": True, "tensor_parallel_size": 2, "enable_eplb": True}, False),
    ],
)
def test_load_by_rank_where_experts_lie_in_order(parallel: dict[str, Any], ranked: bool) -> None:
    meter = expert_load_meter(*engine({"expert_metrics": True}, layers=2, **parallel))
    assert meter is not None
    meter.take([{0: LayerCounts([0] * 8, 0)}])
    assert meter.load is not None
    assert (meter.load.rank_skew is not None) == ranked
