from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hycluster.errors import SettingsError
from hycluster.settings.model import Recycle, Routing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm import forward_context

    from hycluster.models.recycling import recycle, route
    from hycluster.models.routing import ExpertRouter, layer_counts, routed_layers, router, routing_settings

COUNTING = Routing(expert_metrics=True)
RECYCLING = Routing(recycle=Recycle(capacity_factor=1.0, seed=3), expert_metrics=True)


@contextmanager
def step(padding: Tensor | None) -> Iterator[None]:
    """A step of vLLM's model runner, as far as routing looks at it."""
    with forward_context.override_forward_context(SimpleNamespace(is_padding=padding)):  # type: ignore[arg-type]
        yield


def call(f: ExpertRouter, logits: Tensor) -> tuple[Tensor, Tensor]:
    """As vLLM does."""
    return f(hidden_states=torch.empty(len(logits), 4), gating_output=logits, topk=f.top_k, renormalize=False)


def logits(rows: int = 64, experts: int = 8) -> Tensor:
    skewed = torch.randn(rows, experts, generator=torch.Generator().manual_seed(0))
    skewed[:, 2] += 3
    return skewed


def test_vllm_does_it_itself_where_nothing_is_asked() -> None:
    assert router(8, 1, 0, Routing()) is None
    assert router(8, 1, 0, Routing(recycle=Recycle())) is not None
    assert router(8, 1, 0, Routing(expert_metrics=True)) is not None


@pytest.mark.parametrize("top_k", [1, 2])
def test_counting_changes_no_choice(top_k: int) -> None:
    f = ExpertRouter(8, top_k, 0, COUNTING)
    weights, ids = call(f, logits())
    expected_weights, expected_ids = route(logits(), top_k)
    assert torch.equal(weights, expected_weights)
    assert torch.equal(ids, expected_ids)
    counts = f.counts()
    assert counts is not None
    assert counts.tokens == torch.bincount(ids.flatten(), minlength=8).tolist()
    assert counts.moved == 0


def test_recycling_heeds_settings_and_layer() -> None:
    f = ExpertRouter(8, 1, 5, RECYCLING)
    weights, ids = call(f, logits())
    expected_weights, expected_ids, moved = recycle(logits(), 1, 1.0, 3, layer=5)
    assert torch.equal(weights, expected_weights)
    assert torch.equal(ids, expected_ids)
    counts = f.counts()
    assert counts is not None
    assert counts.tokens == [8] * 8
    assert counts.moved == moved.sum() > 0


def test_counts_add_up_over_steps() -> None:
    f = ExpertRouter(8, 2, 0, COUNTING)
    for _ in range(3):
        call(f, logits())
    counts = f.counts()
    assert counts is not None
    assert sum(counts.tokens) == 3 * 64 * 2


def test_padded_rows_are_not_counted_and_take_no_place() -> None:
    f = ExpertRouter(8, 1, 0, RECYCLING)
    with step(padding=torch.arange(64) >= 16):
        _, ids = call(f, logits())
    counts = f.counts()
    assert counts is not None
    assert counts.tokens == [2] * 8
    assert torch.equal(ids[16:], route(logits(), 1)[1][16:])


def test_a_dummy_batch_counts_for_nothing() -> None:
    f = ExpertRouter(8, 1, 0, RECYCLING)
    with step(padding=torch.ones(64, dtype=torch.bool)):
        call(f, logits())
    counts = f.counts()
    assert counts is not None
    assert not any(counts.tokens)


def test_rows_that_are_not_this_ranks_batch_all_count() -> None:
    f = ExpertRouter(8, 1, 0, COUNTING)
    with step(padding=torch.ones(32, dtype=torch.bool)):
        call(f, logits(rows=64))
    counts = f.counts()
    assert counts is not None
    assert sum(counts.tokens) == 64


def test_counts_of_this_process_by_layer() -> None:
    before = routed_layers()
    routers = [
        ExpertRouter(8, 1, layer, settings) for layer, settings in ((70, COUNTING), (71, Routing(recycle=Recycle())))
    ]
    call(routers[0], logits())
    assert routed_layers() == before + 2
    mine = {layer: counts for layer, counts in layer_counts().items() if layer >= 70}
    # Layer 71 counts nothing.
    assert mine.keys() == {70}
    assert sum(mine[70].tokens) == 64
    del routers
    assert routed_layers() == before


@pytest.mark.parametrize("settings", [COUNTING, RECYCLING])
def test_compiled_for_cpu_each_step_has_its_own_padding(settings: Routing) -> None:
    torch._dynamo.reset()
    eager, traced = ExpertRouter(8, 2, 1, settings), ExpertRouter(8, 2, 1, settings)
    compiled = torch.compile(lambda x: call(traced, x), fullgraph=True, dynamic=True, backend="aot_eager")
    for padded in (0, 10, 64):
        with step(padding=torch.arange(64) >= 64 - padded):
            for got, expected in zip(compiled(logits()), call(eager, logits()), strict=True):
                torch.testing.assert_close(got, expected)
    assert traced.counts() == eager.counts()


def test_settings_travel_in_additional_config() -> None:
    assert routing_settings({}) == routing_settings({"other": 1}) == routing_settings(None) == Routing()
    sent: dict[str, Any] = {"hycluster": {"routing": RECYCLING.model_dump(exclude_none=True)}}
    assert routing_settings(sent) == RECYCLING


def test_wrong_settings_are_named() -> None:
    with pytest.raises(SettingsError, match=r"additional_config\.hycluster\.routing.*capacity_factor.*-1"):
        routing_settings({"hycluster": {"routing": {"recycle": {"capacity_factor": -1}}}})
