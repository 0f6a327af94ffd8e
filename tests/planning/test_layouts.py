"""The search: what others publish as their setups, and what it must not do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hycluster.errors import SettingsError
from hycluster.planning.gpus import GPUS, gpu
from hycluster.planning.layouts import Pinned, Search, Workload, candidates, describe, search
from hycluster.planning.precision import precision_of
from hycluster.planning.rules import refusals
from hycluster.settings.parallel import Parallel
from tests.planning.configs import PATHS, published, shape

ONE = Workload(8192, 1)


def found(
    name: str,
    on: str,
    weights: str | None = None,
    kv: str | None = None,
    demand: Workload = ONE,
    pinned: Pinned | None = None,
) -> Search:
    return search(shape(name), precision_of(published(name), weights, kv), gpu(on), demand, pinned)


# Setups that are published as what the model takes; sources are in docs/planning.md.
@pytest.mark.parametrize(
    ("name", "on", "weights", "gpus", "layout"),
    [
        ("hunyuan-large", "H20", None, 16, "tensor 8, data 2, expert"),
        ("hunyuan-large", "H20", "int8", 8, "tensor 8, expert"),
        ("hunyuan-large", "H20", "fp8", 8, "tensor 8, expert"),
        ("llama-3.1-8b", "H100", None, 1, "one GPU"),
        ("llama-3.1-70b", "H100", None, 2, "tensor 2"),
        ("llama-3.1-405b", "H100", None, 16, "tensor 8, pipeline 2"),
        ("llama-3.1-405b", "H100", "fp8", 8, "tensor 8"),
        ("qwen3-235b-a22b", "H200", None, 4, "tensor 4, expert"),
        ("deepseek-v3", "H200", None, 8, "tensor 8, expert"),
        ("gpt-oss-120b", "A100-80GB", None, 1, "one GPU"),
    ],
)
def test_takes_what_is_published(name: str, on: str, weights: str | None, gpus: int, layout: str) -> None:
    best = found(name, on, weights).fits[0]
    assert (best.gpus, describe(best.parallel)) == (gpus, layout)


# Setups that are published as comfortable: no more must be asked for.
@pytest.mark.parametrize(
    ("name", "on", "weights", "kv", "gpus"),
    [
        ("hunyuan-a13b", "H20", None, None, 4),
        ("hunyuan-a13b", "H20", "fp8", "fp8", 2),
        ("hunyuan-a13b", "MI300X", None, None, 2),
        ("deepseek-v3", "MI300X", None, None, 8),
        ("qwen3-235b-a22b", "MI300X", None, None, 4),
    ],
)
def test_takes_no_more_than_is_published(name: str, on: str, weights: str | None, kv: str | None, gpus: int) -> None:
    assert found(name, on, weights, kv).fits[0].gpus <= gpus


def test_tells_what_smaller_ones_miss() -> None:
    misfits = found("hunyuan-large", "H20").misfits
    assert [misfit.parallel.devices for misfit in misfits] == [1, 2, 4, 8]
    assert all(misfit.missing_bytes > 0 for misfit in misfits)


def test_more_sequences_take_more_gpus_where_that_takes_fewest() -> None:
    one = found("llama-3.1-8b", "L4").fits[0]
    many = found("llama-3.1-8b", "L4", demand=Workload(8192, 100)).fits[0]
    assert many.replicas * many.sequences >= 100
    assert many.gpus > one.gpus
    # A GPU more for KV cache alone holds more than a GPU with weights of its own.
    assert many.parallel.tensor > 1


def test_latent_caches_are_kept_apart_when_there_are_many_sequences() -> None:
    few = found("deepseek-v3", "H200").fits[0]
    many = found("deepseek-v3", "H200", demand=Workload(8192, 200)).fits[0]
    assert (few.parallel.tensor, few.parallel.data) == (8, 1)
    assert many.gpus == 8
    assert many.parallel.data > 1


@pytest.mark.parametrize(
    ("pinned", "layout"),
    [
        (Pinned(pipeline=2), "tensor 8, pipeline 2, expert"),
        (Pinned(tensor=4), "tensor 4, data 4, expert"),
        (Pinned(data=16), "tensor 2, data 16"),
        (Pinned(expert=False, pipeline=1), "tensor 8, data 2"),
    ],
)
def test_what_is_pinned_stays(pinned: Pinned, layout: str) -> None:
    best = found("hunyuan-large", "H20", demand=Workload(1024, 1), pinned=pinned).fits[0]
    assert describe(best.parallel) == layout


@pytest.mark.parametrize(
    ("name", "on", "demand", "pinned", "says"),
    [
        (
            "llama-3.1-8b",
            "H20",
            Workload(131_073, 1),
            None,
            "--context-tokens: 131073 is not allowed; this model has 131072",
        ),
        (
            "llama-3.1-8b",
            "H20",
            Workload(1024, 1),
            Pinned(tensor=3),
            "layout: no such layout on nodes of 8 GPUs; tensor must",
        ),
        (
            "llama-3.1-8b",
            "H20",
            Workload(1024, 1),
            Pinned(expert=True),
            "layout: expert: this model has no routed experts",
        ),
        (
            "llama-3.1-8b",
            "H20",
            Workload(1024, 1),
            Pinned(data=2),
            "layout: data 2: without routed experts such ranks share",
        ),
        (
            "hunyuan-large",
            "H20",
            Workload(1024, 1),
            Pinned(data=32, expert=True),
            "layout: expert over 32 ranks: 16 experts",
        ),
        (
            "llama-3.1-405b",
            "L4",
            Workload(1024, 1, most_gpus=8),
            None,
            "layout: with tensor 4, pipeline 2 a GPU would hold 94.5 GiB of weights and 0.1 GiB of KV cache",
        ),
    ],
)
def test_what_cannot_be_says_why(name: str, on: str, demand: Workload, pinned: Pinned | None, says: str) -> None:
    with pytest.raises(SettingsError) as refused:
        found(name, on, demand=demand, pinned=pinned)
    assert any(line.startswith(says) for line in refused.value.message.splitlines())
    assert all(line.startswith(("layout: ", "--")) for line in refused.value.message.splitlines())


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(PATHS)),
    on=st.sampled_from(sorted(GPUS)),
    context=st.integers(1, 30_000),
    concurrency=st.integers(1, 2000),
)
def test_whatever_is_found_holds_what_was_asked_for(name: str, on: str, context: int, concurrency: int) -> None:
    demand = Workload(context, concurrency)
    try:
        one = found(name, on, demand=demand)
    except SettingsError:
        return
    assert [fit.gpus for fit in one.fits] == sorted(fit.gpus for fit in one.fits)
    for fit in one.fits:
        each = -(-concurrency // fit.replicas // fit.parallel.data)
        assert fit.replicas * fit.sequences >= concurrency
        assert fit.share.kv_bytes(context) * each <= fit.free_bytes
        used = (fit.share.weights_bytes + fit.share.kv_bytes(context) * each) / 2**30
        assert used <= 0.9 * gpu(on).memory_gib - 4 + 1e-6
        assert fit.parallel.tensor <= 8
        assert fit.parallel.devices in (1, 2, 4, 8) or fit.parallel.devices % 8 == 0
        assert not refusals(shape(name), fit.parallel, precision_of(published(name)))
        assert fit.nodes(8) * 8 >= fit.gpus


def test_every_layout_is_looked_at_once() -> None:
    tried = list(candidates(shape("hunyuan-large"), Workload(1, 1, most_gpus=32), Pinned()))
    assert len(set(tried)) == len(tried)
    assert Parallel(tensor=8, data=4, expert=True) in tried


def test_nodes_of_another_size() -> None:
    best = found("hunyuan-large", "H20", demand=Workload(8192, 1, per_node=4)).fits[0]
    assert best.parallel.tensor <= 4
    assert best.nodes(4) * 4 == best.gpus
