"""Decisions on the size of a pool: single ones, and that they hold together over any course of load."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hycluster.core import ReplicaLoad
from hycluster.directory.autoscaling import LAPSE_S, UNKNOWN_START_S, Decision, Memory, PoolLoad, decide, needed
from hycluster.settings.pool import Autoscaling, Replicas

RULES = Autoscaling(
    target_outstanding_tokens=1000, scale_up_after_s=2, scale_down_after_s=60, scale_to_zero_after_s=100
)
SLEEPS = Replicas(min=0, max=5)
TICK_S = 0.5


def tokens(outstanding: int) -> PoolLoad:
    return PoolLoad(gateways=1, outstanding_tokens=outstanding)


IDLE = tokens(0)


class Pool:
    """Decides again and again, on a clock of its own. Replicas start at once, unless ``starts`` says otherwise."""

    def __init__(self, target: int, replicas: Replicas = SLEEPS, rules: Autoscaling = RULES, ranks: int = 1) -> None:
        self.target = self.running = target
        self.now_s = 0.0
        self.starts = True
        self._fixed = {"replicas": replicas, "rules": rules, "ranks": ranks}
        self._memory = Memory()

    def see(self, load: PoolLoad) -> Decision:
        decision = decide(
            load,
            target=self.target,
            running=self.running,
            memory=self._memory,
            now_s=self.now_s,
            **self._fixed,  # type: ignore[arg-type]
        )
        self._memory, self.target = decision.memory, decision.target
        self.running = self.target if self.starts else min(self.running, self.target)
        return decision

    def under(self, load: PoolLoad, seconds: float, tick_s: float = TICK_S) -> list[int]:
        """The targets while this load lasts."""
        seen = []
        for _ in range(round(seconds / tick_s)):
            self.now_s += tick_s
            seen.append(self.see(load).target)
        return seen


def test_more_than_a_replica_should_have_brings_another_one() -> None:
    pool = Pool(1)
    assert set(pool.under(tokens(2500), RULES.scale_up_after_s)) == {1}
    assert pool.under(tokens(2500), 1)[-1] == 3


def test_a_peak_brings_none() -> None:
    pool = Pool(1)
    for _ in range(5):
        assert set(pool.under(tokens(5000), 1.5)) == {1}
        pool.under(tokens(100), TICK_S)


def test_what_lasts_counts_and_not_the_highest_peak() -> None:
    pool = Pool(1)
    pool.under(tokens(5000), 1)
    assert pool.under(tokens(1500), 3)[-1] == 2


def test_a_sleeping_pool_is_woken_at_once_by_as_many_as_are_needed() -> None:
    decision = Pool(0).see(replace(tokens(2500), waiting_requests=7))
    assert (decision.target, decision.cause, decision.reason) == (3, "wake", "7 requests wait")


def test_a_caller_that_was_told_to_come_back_wakes_it_too() -> None:
    assert Pool(0).see(replace(IDLE, waiting_requests=1)).target == 1


def test_down_after_a_quiet_time_to_what_was_needed_in_it() -> None:
    pool = Pool(4)
    pool.under(tokens(300), 30)
    pool.under(tokens(1500), 10)
    assert set(pool.under(tokens(300), 19)) == {4}
    # 1500 tokens want more than 1.6 replicas: two of them would be full enough.
    assert pool.under(tokens(300), 2)[-1] == 2
    assert pool.under(tokens(300), 61)[-1] == 1


def test_load_that_comes_back_begins_the_quiet_time_anew() -> None:
    pool = Pool(2)
    pool.under(tokens(100), 59)
    pool.under(tokens(1900), TICK_S)
    assert set(pool.under(tokens(100), 59)) == {2}


def test_what_just_fits_on_fewer_replicas_does_not_go_there() -> None:
    assert set(Pool(2).under(tokens(900), 1000)) == {2}
    assert Pool(2).under(tokens(700), 100)[-1] == 1


def test_to_zero_when_nobody_has_asked_for_long_enough() -> None:
    pool = Pool(1)
    assert set(pool.under(IDLE, 99)) == {1}
    pool.under(tokens(1), TICK_S)
    assert set(pool.under(IDLE, 99)) == {1}
    assert pool.under(IDLE, 2)[-1] == 0


def test_an_engine_that_is_probed_is_idle() -> None:
    busy = replace(IDLE, engines=(ReplicaLoad(running=1, most_running=64),))
    assert Pool(1).under(busy, 101)[-1] == 0


def test_from_several_to_zero() -> None:
    pool = Pool(3)
    seen = pool.under(IDLE, 101)
    assert [target for target, _ in itertools.groupby(seen)] == [3, 1, 0]


def test_a_pool_with_a_floor_keeps_it() -> None:
    assert Pool(3, Replicas(min=2, max=4)).under(IDLE, 1000)[-1] == 2


def test_what_was_started_for_somebody_who_left_is_not_stopped_before_it_has_started() -> None:
    pool = Pool(0)
    pool.starts = False
    pool.see(replace(IDLE, waiting_requests=1))
    assert set(pool.under(IDLE, UNKNOWN_START_S - 1)) == {1}
    pool.running = 1
    assert set(pool.under(IDLE, 99)) == {1}
    assert pool.under(IDLE, 2)[-1] == 0


def test_a_start_that_never_ends_is_given_up() -> None:
    pool = Pool(0)
    pool.starts = False
    pool.see(replace(IDLE, waiting_requests=1))
    assert pool.under(replace(IDLE, cold_start_s=20.0), 40 + 99)[-1] == 1
    assert pool.under(replace(IDLE, cold_start_s=20.0), 2)[-1] == 0


def test_a_replica_that_is_slow_to_start_is_kept_for_longer() -> None:
    slow = replace(tokens(100), cold_start_s=300.0)
    assert set(Pool(2).under(slow, 299)) == {2}
    assert Pool(2).under(slow, 302)[-1] == 1


def test_nothing_is_decided_while_nothing_is_known() -> None:
    pool = Pool(2)
    assert set(pool.under(PoolLoad(), 1000)) == {2}


def test_time_in_which_nothing_was_known_is_not_quiet() -> None:
    pool = Pool(2)
    pool.under(tokens(100), 59)
    pool.now_s += LAPSE_S + 1
    assert set(pool.under(tokens(100), 59)) == {2}


@pytest.mark.parametrize(
    ("load", "ranks", "replicas", "cause"),
    [
        (tokens(1500), 1, 1.5, "tokens"),
        (
            PoolLoad(waiting_requests=1, engines=(ReplicaLoad(kv_usage=0.8), ReplicaLoad(kv_usage=0.4))),
            1,
            1.5,
            "kv_cache",
        ),
        (
            PoolLoad(waiting_requests=1, engines=(ReplicaLoad(kv_usage=0.8), ReplicaLoad(kv_usage=0.4))),
            2,
            0.75,
            "kv_cache",
        ),
        (PoolLoad(waiting_requests=1, engines=(ReplicaLoad(running=8, waiting=12, most_running=10),)), 1, 2.5, "queue"),
        (
            PoolLoad(waiting_requests=1, engines=(ReplicaLoad(running=8, waiting=8, most_running=10),) * 2),
            2,
            2.0,
            "queue",
        ),
        # How many fit into a batch is not known.
        (PoolLoad(waiting_requests=1, engines=(ReplicaLoad(running=8, waiting=12),)), 1, 0.0, "tokens"),
    ],
)
def test_the_measure_that_asks_for_most_decides(load: PoolLoad, ranks: int, replicas: float, cause: str) -> None:
    need = needed(load, RULES, ranks)
    assert need.cause == cause
    assert need.replicas == pytest.approx(replicas)


def test_settings_that_changed_hold_at_once() -> None:
    decision = Pool(9).see(IDLE)
    assert (decision.target, decision.cause) == (5, "bounds")


counts = st.integers(0, 60)
engines = st.lists(
    st.builds(ReplicaLoad, running=counts, waiting=counts, most_running=st.integers(0, 64), kv_usage=st.floats(0, 1)),
    max_size=4,
).map(tuple)
loads = st.builds(
    PoolLoad,
    gateways=st.integers(0, 2),
    waiting_requests=st.integers(0, 3),
    outstanding_tokens=st.one_of(st.just(0), st.integers(0, 10_000)),
    engines=engines,
    cold_start_s=st.none() | st.floats(0, 100),
)
bounds = st.tuples(st.integers(0, 3), st.integers(1, 6)).map(lambda b: Replicas(min=b[0], max=max(b)))
times = st.floats(0, 50)
rules = st.builds(
    Autoscaling,
    target_outstanding_tokens=st.integers(1, 5000),
    scale_up_after_s=st.floats(0, 5),
    scale_down_after_s=times,
    scale_to_zero_after_s=times,
)
courses = st.lists(st.tuples(st.floats(0, 20), loads), max_size=25)


def course(pool: Pool, steps: Iterable[tuple[float, PoolLoad]]) -> Iterable[tuple[int, PoolLoad, Decision]]:
    for seconds, load in steps:
        pool.now_s += seconds
        before = pool.target
        yield before, load, pool.see(load)


@given(bounds, rules, st.integers(0, 8), courses)
def test_within_bounds_with_a_reason_and_never_asleep_before_a_caller(
    replicas: Replicas, rules: Autoscaling, target: int, steps: list[tuple[float, PoolLoad]]
) -> None:
    for before, load, decision in course(Pool(target, replicas, rules), steps):
        assert replicas.min <= decision.target <= replicas.most
        if load.gateways:
            assert (decision.target != before) == bool(decision.reason) == bool(decision.cause)
            assert decision.target > 0 or load.idle
        else:
            assert decision.target == min(max(before, replicas.min), replicas.most)


@given(bounds, rules, st.integers(0, 6), courses)
def test_to_zero_only_after_all_of_the_idle_time(
    replicas: Replicas, rules: Autoscaling, target: int, steps: list[tuple[float, PoolLoad]]
) -> None:
    pool = Pool(min(target, replicas.most), replicas, rules)
    asked_s = pool.now_s
    for before, load, decision in course(pool, steps):
        if load.gateways and not load.idle:
            asked_s = pool.now_s
        if before > 0 and decision.target == 0 and decision.cause != "bounds":
            assert pool.now_s - asked_s >= rules.scale_to_zero_after_s


@given(bounds, rules, st.integers(0, 6), courses, loads, st.integers(0, 5000), st.integers(0, 9), st.integers(1, 3))
def test_more_load_never_means_fewer_replicas(
    replicas: Replicas,
    rules: Autoscaling,
    target: int,
    steps: list[tuple[float, PoolLoad]],
    load: PoolLoad,
    more_tokens: int,
    more_waiting: int,
    ranks: int,
) -> None:
    pool = Pool(min(target, replicas.most), replicas, rules, ranks)
    for _ in course(pool, steps):
        pass
    more = replace(
        load,
        outstanding_tokens=load.outstanding_tokens + more_tokens,
        waiting_requests=load.waiting_requests + more_waiting,
        engines=tuple(
            replace(engine, waiting=engine.waiting + more_waiting, kv_usage=min(1.0, engine.kv_usage + 0.1))
            for engine in load.engines
        ),
    )
    now = {
        "target": pool.target,
        "running": pool.running,
        "replicas": replicas,
        "rules": rules,
        "ranks": ranks,
        "memory": pool._memory,
        "now_s": pool.now_s,
    }
    assert decide(more, **now).target >= decide(load, **now).target  # type: ignore[arg-type]


@settings(max_examples=60)
@given(bounds, rules, st.integers(0, 6), courses, loads)
def test_under_steady_load_it_comes_to_rest(
    replicas: Replicas,
    rules: Autoscaling,
    target: int,
    steps: list[tuple[float, PoolLoad]],
    load: PoolLoad,
) -> None:
    pool = Pool(min(target, replicas.most), replicas, rules)
    for _ in course(pool, steps):
        pass
    seen = [pool.target, *pool.under(load, 2 * UNKNOWN_START_S, tick_s=2)]
    changes = [after - before for before, after in itertools.pairwise(seen) if after != before]
    # Up at most once, or down, by way of what was needed a while ago, to what is needed now; never both.
    assert all(change > 0 for change in changes) or all(change < 0 for change in changes)
    assert len(changes) <= 3
    settled = pool.target
    assert set(pool.under(load, 300, tick_s=2)) == {settled}
