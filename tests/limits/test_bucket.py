from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hycluster.limits.bucket import Bucket, PlacesInUse
from hycluster.limits.slots import SLOT_S, WINDOW_S

LIMIT = 40
# Seconds since the last one, what is wanted, whether requests were refused, who asks.
STEP = st.tuples(st.floats(0, 30), st.integers(0, 60), st.booleans(), st.sampled_from("abc"))


def give(bucket: Bucket, now_s: float, want: int, who: str = "a", least: int = 1) -> int:
    return bucket.give(who, limit=LIMIT, want=want, need=want, least=min(least, want), processes=3, now_s=now_s)


@given(st.lists(STEP, max_size=80))
def test_within_a_window_no_more_than_the_limit_is_given(steps: list[tuple[float, int, bool, str]]) -> None:
    bucket, now_s = Bucket(period=False), 1000.0
    given: list[tuple[float, int]] = []
    for passed_s, want, refused, who in steps:
        now_s += passed_s
        if refused:
            bucket.press(now_s)
        given.append((now_s, give(bucket, now_s, want, who)))
        # While requests are refused it may be one more: docs/auth.md.
        recent = [amount for at_s, amount in given if now_s - at_s < WINDOW_S]
        assert sum(recent) <= LIMIT + 1


@given(st.lists(STEP, max_size=80), st.lists(st.integers(0, 60), min_size=80, max_size=80))
def test_what_is_given_back_is_given_again_and_no_more(
    steps: list[tuple[float, int, bool, str]], backs: list[int]
) -> None:
    bucket, now_s, out = Bucket(period=False), 1000.0, 0
    for (_, want, _, who), back in zip(steps, backs, strict=False):
        # All within one window.
        now_s += 0.1
        out += give(bucket, now_s, want, who)
        bucket.take_back(min(back, out), now_s, age_s=0.05)
        out -= min(back, out)
        assert bucket.usage.used(now_s) == out <= LIMIT


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 30)), min_size=1, max_size=40), st.data())
def test_a_new_book_knows_what_the_last_hearer_knew(steps: list[tuple[float, int]], data: st.DataObject) -> None:
    bucket, now_s = Bucket(period=False), 1000.0
    heard: dict[str, tuple[int, dict[int | str, int]]] = {"a": (-1, {}), "b": (-1, {})}
    for passed_s, want in steps:
        now_s += passed_s
        who = data.draw(st.sampled_from("ab"))
        give(bucket, now_s, want, who)
        sequence, slots = heard[who]
        heard[who] = (bucket.sequence, {**slots, **dict(bucket.changed_since(sequence))})
    new = Bucket(period=False)
    new.charge(3, now_s)
    for sequence, slots in data.draw(st.permutations(list(heard.values()))):
        new.recover(sequence, slots.items(), None, now_s)
    assert new.usage.used(now_s) == bucket.usage.used(now_s) + 3


def test_at_an_even_pace_while_requests_are_refused() -> None:
    bucket = Bucket(period=False)
    assert give(bucket, 1000.0, LIMIT) == LIMIT
    given = []
    for step in range(1, 1200):
        now_s = 1000 + step / 10
        bucket.press(now_s)
        given.append((now_s, give(bucket, now_s, 5)))
    times = [at_s for at_s, amount in given if amount]
    assert times[0] >= 1000 + WINDOW_S
    # One and a half seconds each.
    assert all(1.0 <= later - earlier <= 2.1 for earlier, later in pairwise(times[1:]))


def paced(bucket: Bucket, from_s: float, until_s: float) -> list[float]:
    """When each one was given, while more want one than there are."""
    given = []
    for step in range(int(from_s * 10), int(until_s * 10)):
        bucket.press(step / 10)
        given += [step / 10] * give(bucket, step / 10, 5)
    return given


def test_what_could_not_be_given_out_is_made_up_for_and_no_minute_has_more() -> None:
    bucket = Bucket(period=False)
    given = [*paced(bucket, 1000, 1100), *paced(bucket, 1108, 1300)]
    assert LIMIT * 5 <= len(given) <= 1.02 * LIMIT * 5
    assert max(sum(at_s <= later < at_s + 60 for later in given) for at_s in given) == LIMIT + 1


def test_a_new_book_goes_on_at_the_pace() -> None:
    bucket, new = Bucket(period=False), Bucket(period=False)
    paced(bucket, 1000, 1100)
    new.recover(bucket.sequence, list(bucket.usage.slots.items()), bucket.pace, 1102)
    assert paced(new, 1103, 1200) == paced(bucket, 1103, 1200)


def test_what_is_owed_is_paid_off_whether_others_are_refused_or_not() -> None:
    bucket = Bucket(period=False)
    give(bucket, 1000.0, 1)
    bucket.charge(3 * LIMIT - 1, 1001.0, limit=LIMIT)
    assert not give(bucket, 1000 + 2.9 * 60, 1)
    assert give(bucket, 1000 + 3 * 60, 1)


def test_what_is_too_little_for_one_is_kept_for_him() -> None:
    bucket = Bucket(period=False)
    assert give(bucket, 1000.0, LIMIT - 4) == LIMIT - 4
    assert give(bucket, 1000.1, 5, "a", least=5) == 0
    assert give(bucket, 1000.2, 1, "b") == 0
    bucket.take_back(1, 1000.3)
    assert give(bucket, 1000.3, 5, "a", least=5) == 5


def test_when_there_is_more() -> None:
    bucket = Bucket(period=False)
    give(bucket, 1000.0, LIMIT)
    assert bucket.wait_s(1, LIMIT, 1010.0) == pytest.approx(WINDOW_S - 10, abs=SLOT_S)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.booleans()), max_size=60))
def test_places(steps: list[tuple[str, int, bool]]) -> None:
    places, held = PlacesInUse(), dict.fromkeys("abc", 0)
    for who, amount, ends in steps:
        if ends:
            held[who] = max(0, held[who] - amount)
        held[who] += places.give(who, limit=10, want=0 if ends else amount, holds=held[who], gone=set())
        assert sum(held.values()) <= 10


def test_places_of_the_dead_are_given_to_others() -> None:
    places = PlacesInUse()
    assert places.give("a", limit=3, want=3, holds=0, gone=set()) == 3
    assert places.give("b", limit=3, want=2, holds=0, gone=set()) == 0
    assert places.give("b", limit=3, want=2, holds=0, gone={"a"}) == 2
