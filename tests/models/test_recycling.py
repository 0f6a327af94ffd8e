"""Random compensation against an implementation that is slow and obvious."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hycluster.models.recycling import expert_loads, recycle, route


@st.composite
def batches(draw: st.DrawFn) -> dict[str, object]:
    """Arguments of ``recycle``: skewed logits, some rows padded."""
    experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, min(experts, 4)))
    tokens = draw(st.integers(0, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    skew = draw(st.sampled_from([0.0, 1.0, 4.0, 200.0]))
    logits = torch.randn(tokens, experts, generator=generator)
    logits += skew * torch.linspace(1, 0, experts)
    padding = None
    if draw(st.booleans()):
        padding = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return {
        "logits": logits,
        "top_k": top_k,
        "capacity_factor": draw(st.sampled_from([0.3, 0.5, 0.9, 1.0, 1.1, 1.25, 2.0, 100.0])),
        "seed": draw(st.integers(0, 1 << 40)),
        "layer": draw(st.integers(0, 100)),
        "padding": padding,
        "min_capacity": draw(st.integers(1, 8)),
    }


def as_lists(batch: dict[str, object]) -> tuple[list[list[float]], list[list[int]], list[bool], int]:
    """Probabilities, plain choices, which rows are real, and the capacity, in plain Python."""
    logits, top_k, padding = batch["logits"], batch["top_k"], batch["padding"]
    assert isinstance(logits, Tensor)
    assert isinstance(top_k, int)
    assert isinstance(batch["capacity_factor"], float)
    _, ids = route(logits, top_k)
    real = [True] * len(logits) if padding is None else [not p for p in padding.tolist()]  # type: ignore[attr-defined]
    factor = round(batch["capacity_factor"] * 100)
    # In whole numbers: no rounding to argue about.
    capacity = -(-factor * sum(real) * top_k // (100 * logits.shape[1]))
    assert isinstance(batch["min_capacity"], int)
    capacity = max(capacity, batch["min_capacity"])
    return logits.softmax(-1).tolist(), ids.tolist(), real, capacity


def kept_of(probabilities: list[list[float]], ids: list[list[int]], real: list[bool], capacity: int) -> list[set[int]]:
    """By row, the experts that keep it: of each expert's tokens the best ones."""
    kept: list[set[int]] = [set() for _ in ids]
    for expert in range(len(probabilities[0]) if probabilities else 0):
        mine = [row for row, chosen in enumerate(ids) if real[row] and expert in chosen]
        mine.sort(key=lambda row: (-probabilities[row][expert], row))
        for row in mine[:capacity]:
            kept[row].add(expert)
    return kept


@settings(max_examples=300, deadline=None)
@given(batches())
def test_every_rule_holds(batch: dict[str, object]) -> None:
    probabilities, plain, real, capacity = as_lists(batch)
    top_k = batch["top_k"]
    assert isinstance(top_k, int)
    weights, ids, moved = recycle(**batch)  # type: ignore[arg-type]
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert weights.shape == ids.shape == (len(plain), top_k)
    assert weights.isfinite().all()
    kept = kept_of(probabilities, plain, real, capacity)
    experts = range(len(probabilities[0]) if probabilities else 0)
    loads = {e: sum(real[r] and e in chosen for r, chosen in enumerate(ids.tolist())) for e in experts}
    before = {e: sum(real[r] and e in chosen for r, chosen in enumerate(plain)) for e in experts}
    assert sum(loads.values()) == sum(before.values())
    for row, chosen in enumerate(ids.tolist()):
        if not real[row]:
            assert chosen == plain[row]
            assert moved[row] == 0
            continue
        assert len(set(chosen)) == top_k
        assert kept[row] <= set(chosen)
        new = set(chosen) - set(plain[row])
        assert moved[row] == len(new)
        # Who stays beyond capacity had nowhere to go.
        surplus = set(chosen) - kept[row] - new
        if surplus:
            assert all(loads[e] >= capacity or e in chosen for e in experts)
        for expert in new:
            assert before[expert] < capacity
            assert loads[expert] <= capacity
        asked = [probabilities[row][e] for e in chosen]
        total = sum(asked) if top_k > 1 else 1.0
        expected = [p / max(total, torch.finfo(torch.float32).tiny) for p in asked]
        assert weights[row].tolist() == pytest.approx(expected, abs=1e-6)
    if top_k == 1 and capacity * len(experts) >= sum(real):
        assert max(loads.values(), default=0) <= capacity


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(1, 20))
def test_padding_changes_nothing_for_the_tokens(batch: dict[str, object], rows: int) -> None:
    logits, padding = batch["logits"], batch["padding"]
    assert isinstance(logits, Tensor)
    padding = torch.zeros(len(logits), dtype=torch.bool) if padding is None else padding
    assert isinstance(padding, Tensor)
    garbage = torch.randn(rows, logits.shape[1]) * 10
    longer = batch | {"logits": torch.cat([logits, garbage]), "padding": torch.cat([padding, torch.ones(rows) > 0])}
    for short, long in zip(recycle(**batch), recycle(**longer), strict=True):  # type: ignore[arg-type]
        # Softmax over a longer batch may vectorize otherwise.
        torch.testing.assert_close(short, long[: len(logits)], rtol=1e-6, atol=0)


@settings(max_examples=50, deadline=None)
@given(batches())
def test_room_for_all_is_plain_routing(batch: dict[str, object]) -> None:
    logits, top_k = batch["logits"], batch["top_k"]
    assert isinstance(logits, Tensor)
    assert isinstance(top_k, int)
    weights, ids, moved = recycle(logits, top_k, float(logits.shape[1]), seed=0)
    plain_weights, plain_ids = route(logits, top_k)
    assert torch.equal(ids, plain_ids)
    assert torch.equal(weights, plain_weights)
    assert not moved.any()


def skewed(tokens: int, experts: int) -> Tensor:
    """Logits of a router that loves its first expert."""
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(1))
    logits[:, 0] += 3
    return logits


def test_top_1_weighs_by_the_raw_probability() -> None:
    logits = skewed(9, 4)
    weights, ids = route(logits, 1)
    assert torch.equal(weights[:, 0], logits.softmax(-1).max(-1).values)
    assert torch.equal(ids[:, 0].long(), logits.argmax(-1))


def test_half_precision_logits_are_weighed_in_float32() -> None:
    logits = skewed(9, 4).half()
    assert torch.equal(route(logits, 2)[0], route(logits.float(), 2)[0])


@pytest.mark.parametrize("top_k", [1, 4])
def test_same_batch_same_experts(top_k: int) -> None:
    logits = skewed(200, 8)
    first = recycle(logits, top_k, 1.0, seed=7, layer=3)
    torch.manual_seed(99)
    again = recycle(logits, top_k, 1.0, seed=7, layer=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("other", [{"seed": 8}, {"layer": 4}])
def test_seed_and_layer_vary_the_draw(other: dict[str, int]) -> None:
    logits = skewed(200, 8)
    draw = {"seed": 7, "layer": 3} | other
    _, ids, moved = recycle(logits, 1, 1.0, seed=draw["seed"], layer=draw["layer"])
    _, expected, expected_moved = recycle(logits, 1, 1.0, seed=7, layer=3)
    # Who is moved follows from the logits alone, where to from the draw.
    assert torch.equal(moved, expected_moved)
    assert not torch.equal(ids, expected)


def test_a_row_is_not_moved_to_the_same_place_in_every_step() -> None:
    """One row of a decode batch, over steps whose other rows differ."""
    targets = set()
    for step in range(40):
        logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
        logits[:, 0] += 4
        logits[5] = torch.tensor([1.0] + [0.0] * 7)
        _, ids, moved = recycle(logits, 1, 1.0, seed=0)
        if moved[5]:
            targets.add(int(ids[5, 0]))
    assert targets == set(range(1, 8))


def test_draw_is_in_proportion_to_room() -> None:
    """6,000 tokens, all for expert 0; of the 3 others two have 1,000 of their own."""
    experts = torch.cat([torch.zeros(6000), torch.ones(1000), torch.full((1000,), 2.0)]).long()
    logits = torch.nn.functional.one_hot(experts, 4).float()
    _, ids, _ = recycle(logits, 1, 1.0, seed=0)
    assert expert_loads(ids, 4).tolist() == [2000] * 4
    early = ids[2000:3000, 0]
    share = expert_loads(early, 4)[1:] / 1000
    # Room is 1000, 1000 and 2000; 1,000 draws of a half without replacement have a sigma of 0.014.
    assert share.tolist() == pytest.approx([0.25, 0.25, 0.5], abs=0.05)


@pytest.mark.parametrize("top_k", [1, 3])
def test_compiles_without_a_break_and_for_any_number_of_tokens(top_k: int) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(recycle, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (33, 64, 100):
        logits = skewed(tokens, 8)
        padding = torch.arange(tokens) >= tokens - 5
        for got, expected in zip(
            compiled(logits, top_k, 1.0, 5, 2, padding), recycle(logits, top_k, 1.0, 5, 2, padding), strict=True
        ):
            torch.testing.assert_close(got, expected)


def test_capacity_is_not_one_more_by_rounding() -> None:
    """1.1 x 100 / 10 is 11, though 1.1 * 100 / 10 is a little more in floating point."""
    assert math.ceil(1.1 * 100 / 10) == 12
    _, ids, _ = recycle(skewed(100, 10), 1, 1.1, seed=0)
    assert expert_loads(ids, 10).max() == 11
