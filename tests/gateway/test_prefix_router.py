from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hycluster.errors import SettingsError, Unavailable
from hycluster.gateway.prefix_router import (
    BOUND,
    PREFIX_POLICIES,
    PoolColumns,
    PrefixPolicy,
    PrefixRequest,
    StepCost,
)

STEP = StepCost(base_s=0.01, prefill_token_s=1e-4, sequence_s=1e-4, kv_token_s=1e-9, step_tokens=1000)
REQUEST = PrefixRequest(prompt_tokens=1000, output_tokens=100, prefix=7)


def view(replicas: int = 2, **columns: Any) -> PoolColumns:
    empty = ("outstanding_tokens", "requests", "prefill_tokens", "decoding", "kv_tokens")
    given_columns = {name: np.array(values, float) for name, values in columns.items()}
    zero = {name: np.zeros(replicas) for name in empty}
    return PoolColumns(replica_ids=[str(each) for each in range(replicas)], step=STEP, **{**zero, **given_columns})


def choose(name: str, pool: PoolColumns, request: PrefixRequest = REQUEST, seed: int = 0) -> int:
    return PrefixPolicy(name, seed).choose(pool, request)


@st.composite
def pools(draw: st.DrawFn) -> PoolColumns:
    replicas = draw(st.integers(1, 8))

    def column(most: int) -> Any:
        return draw(st.lists(st.integers(0, most), min_size=replicas, max_size=replicas))

    known = draw(st.booleans())
    return view(
        replicas,
        outstanding_tokens=column(10_000),
        requests=column(50),
        prefill_tokens=column(10_000),
        decoding=column(50),
        kv_tokens=column(100_000),
        **({"cached_tokens": column(1000), "evicts_age_s": column(1000)} if known else {}),
    )


@pytest.mark.parametrize("name", PREFIX_POLICIES)
@given(pool=pools(), seed=st.integers(0, 100), prefix=st.none() | st.integers(-(1 << 63), (1 << 63) - 1))
def test_always_a_replica_and_a_seed_fixes_which(name: str, pool: PoolColumns, seed: int, prefix: int | None) -> None:
    request = PrefixRequest(prompt_tokens=1000, output_tokens=1, prefix=prefix)
    found = choose(name, pool, request, seed)
    assert 0 <= found < len(pool.replica_ids)
    assert found == choose(name, pool, request, seed)


@pytest.mark.parametrize("name", PREFIX_POLICIES)
def test_no_replica(name: str) -> None:
    with pytest.raises(Unavailable, match="no replica"):
        choose(name, view(0))


@pytest.mark.parametrize("name", PREFIX_POLICIES)
def test_equal_ones_are_taken_by_chance(name: str) -> None:
    request = PrefixRequest(prompt_tokens=1000, output_tokens=1)
    policy = PrefixPolicy(name, 1)
    assert {policy.choose(view(4), request) for _ in range(60)} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", PREFIX_POLICIES)
def test_without_knowledge_of_caches_it_goes_by_load(name: str) -> None:
    busy: dict[str, Any] = {key: [5000, 0] for key in ("outstanding_tokens", "prefill_tokens", "kv_tokens")}
    pool = view(**busy, requests=[5, 0], decoding=[5, 0])
    assert choose(name, pool, PrefixRequest(prompt_tokens=1000, output_tokens=1)) == 1


def test_unknown_policy() -> None:
    with pytest.raises(SettingsError, match="'nearest' is not allowed; must be one of predicted_ttft, "):
        PrefixPolicy("nearest")


class TestPredictedTtft:
    def test_what_is_cached_is_worth_a_queue(self) -> None:
        """As long as what waits there takes less than what would be computed anew, weighted."""
        for queue, chosen in ((3000, 0), (4000, 1)):
            pool = view(cached_tokens=[900, 0], prefill_tokens=[queue, 0])
            assert choose("predicted_ttft", pool) == chosen

    def test_a_hot_prefix_is_spread_by_load(self) -> None:
        pool = view(3, cached_tokens=[900, 900, 0], prefill_tokens=[1500, 200, 0])
        assert choose("predicted_ttft", pool) == 1

    def test_rows_that_decode_make_steps_longer(self) -> None:
        pool = view(prefill_tokens=[1000, 1000], decoding=[100, 0])
        assert choose("predicted_ttft", pool) == 1

    def test_of_equal_queues_the_one_with_fewer_requests(self) -> None:
        """As many tokens wait on both, and their steps are as long."""
        pool = view(prefill_tokens=[1000, 1000], requests=[12, 4])
        assert {choose("predicted_ttft", pool, seed=seed) for seed in range(9)} == {1}

    def test_what_was_of_use_lately_is_not_evicted_for_it(self) -> None:
        assert choose("predicted_ttft", view(evicts_age_s=[5, 500], cached_tokens=[0, 0])) == 1
        assert choose("predicted_ttft", view(evicts_age_s=[500, np.inf], cached_tokens=[0, 0])) == 1

    def test_the_last_token_of_a_prompt_is_always_computed(self) -> None:
        pool = view(cached_tokens=[1000, 1000], prefill_tokens=[0, 1])
        assert choose("predicted_ttft", pool) == 0


class TestPrefixHash:
    def test_one_prefix_has_one_home_and_many_have_all(self) -> None:
        homes = [
            {choose("prefix_hash", view(8), PrefixRequest(prompt_tokens=9, output_tokens=1, prefix=prefix), seed)
             for seed in range(3)}
            for prefix in range(400)
        ]  # fmt: skip
        assert all(len(each) == 1 for each in homes)
        counts = [sum(home in each for each in homes) for home in range(8)]
        # An eighth each, give or take four standard deviations.
        assert all(23 <= count <= 77 for count in counts)

    def test_a_replica_that_goes_moves_its_own_prefixes_only(self) -> None:
        for prefix in range(100):
            request = PrefixRequest(prompt_tokens=9, output_tokens=1, prefix=prefix)
            before, after = (choose("prefix_hash", view(replicas), request) for replicas in (5, 4))
            assert before in (after, 4)

    @given(outstanding=st.lists(st.integers(0, 10_000), min_size=2, max_size=8), prefix=st.integers(0, 100))
    def test_no_home_is_over_its_bound(self, outstanding: list[int], prefix: int) -> None:
        request = PrefixRequest(prompt_tokens=90, output_tokens=10, prefix=prefix)
        chosen = choose("prefix_hash", view(len(outstanding), outstanding_tokens=outstanding), request)
        assert outstanding[chosen] <= BOUND * (sum(outstanding) + 100) / len(outstanding)


def test_longest_match_sees_no_queue() -> None:
    pool = view(3, cached_tokens=[10, 500, 500], outstanding_tokens=[0, 90_000, 80_000])
    assert choose("longest_match", pool) == 2


def test_lmetric_is_a_product() -> None:
    pool = view(cached_tokens=[0, 500], prefill_tokens=[0, 1000], requests=[2, 1])
    # 1000 x 3 and 1500 x 2.
    assert len({choose("lmetric", pool, seed=seed) for seed in range(20)}) == 2


def test_dynamo_is_a_sum() -> None:
    pool = view(cached_tokens=[0, 500], kv_tokens=[100, 601])
    assert choose("dynamo", pool) == 0


def test_a_burst_does_not_run_to_one_replica() -> None:
    """Each choice is counted before the next one."""
    policy, prefill, rng = PrefixPolicy("predicted_ttft", 0), np.zeros(8), random.Random(0)
    for _ in range(80):
        pool = view(8, prefill_tokens=prefill, cached_tokens=np.zeros(8))
        prefill[policy.choose(pool, PrefixRequest(prompt_tokens=rng.randrange(500, 1500), output_tokens=9))] += 1000
    assert prefill.max() - prefill.min() <= 1000
