"""What is held against a request when replicas die with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hycluster.gateway.flight import CLEARED_AFTER_TOKENS, Flight


def sent(prompt_tokens: int = 3, max_tokens: int = 50) -> Flight:
    request: Any = SimpleNamespace(
        priority=0,
        request_id="a",
        prompt_token_ids=list(range(prompt_tokens)),
        sampling_params=SimpleNamespace(max_tokens=max_tokens),
    )
    flight = Flight(request)
    flight.sent("r0")
    return flight


def test_tokens_left_count_the_prompt_with_the_first_output() -> None:
    flight = sent()
    assert flight.tokens_left == 53
    assert flight.take([7]) == 4
    assert flight.take([8, 9]) == 2
    assert flight.tokens_left == 47
    assert flight.output == [7, 8, 9]


def test_a_successor_has_all_of_it_to_compute() -> None:
    flight = sent()
    flight.take([7] * 10)
    flight.lost(died=True)
    assert flight.replica_id == ""
    flight.sent("r1")
    assert (flight.replica_id, flight.engine_id, flight.request_id) == ("r1", "a~1", "a")
    assert flight.tokens_left == 53
    # Prompt and tokens so far in one prefill, which ends with a token.
    assert flight.take([8]) == 3 + 10 + 1
    assert flight.output == [7] * 10 + [8]


def test_expected_tokens() -> None:
    flight = sent(max_tokens=50)
    assert [flight.expected_tokens(tokens) for tokens in (10, 50, 100)] == [13, 53, 53]
    flight.take([7] * 8)
    assert [flight.expected_tokens(tokens) for tokens in (10, 100)] == [2, 42]
    # It is longer than was expected, and there may be more to come.
    assert flight.expected_tokens(5) == 1
    # What the lost replica has computed, the next one prefills.
    flight.lost(died=False)
    flight.sent("r1")
    assert flight.expected_tokens(10) == 3 + 8 + 2
    assert Flight(flight.request).expected_tokens(10) == 13


def test_more_tokens_than_were_asked_for_are_no_negative_work() -> None:
    flight = sent(max_tokens=2)
    flight.take([7] * 4)
    flight.lost(died=True)
    assert flight.tokens_to_compute == 7


def test_deaths_in_a_row_add_up() -> None:
    flight = sent()
    for losses in (1, 2, 3):
        flight.taken = True
        assert not flight.begun
        flight.lost(died=True)
        flight.sent("r")
        assert (flight.losses, flight.deaths) == (losses, losses)
        assert flight.suspected == (losses >= 2)


def test_some_tokens_of_a_replica_clear_it() -> None:
    flight = sent()
    flight.losses = flight.deaths = 2
    flight.take([1] * (CLEARED_AFTER_TOKENS - 1))
    assert flight.suspected
    flight.take([1])
    assert not flight.suspected
    # The replica that it was on dies all the same: that is the first.
    flight.lost(died=True)
    assert (flight.losses, flight.deaths) == (1, 1)


def test_one_that_kills_at_the_same_place_each_time_is_not_cleared_by_what_it_brings_along() -> None:
    flight = sent()
    flight.take([1] * 30)
    for losses in (1, 2, 3):
        flight.lost(died=True)
        assert flight.losses == losses
        flight.sent("r")
        flight.take([1, 1])


def test_a_drain_is_held_against_nobody() -> None:
    flight = sent()
    flight.losses = flight.deaths = 1
    flight.lost(died=False)
    assert (flight.losses, flight.deaths, flight.moves) == (1, 1, 1)


def test_the_death_of_a_replica_that_never_had_it_says_nothing() -> None:
    flight = sent()
    flight.lost(died=True)
    flight.sent("r1")
    assert flight.losses == 1
    flight.lost(died=True)
    assert flight.losses == 1
    # It may still be what replicas die of, and is kept apart from others like it.
    assert flight.suspected
