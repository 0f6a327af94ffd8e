from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hycluster.chaos.compare import difference
from tests.chaos.answers import answer, request


def test_the_same_is_the_same() -> None:
    assert difference(request(), answer(), answer()) is None
    assert difference(request(n=2, temperature=0.9, seed=1), answer(times=2), answer(times=2)) is None


@pytest.mark.parametrize(
    ("got", "says"),
    [
        (answer((1, 2, 4)), "token 2 of 3 is 4, undisturbed 3 of 3"),
        (answer(text="abX"), "text 'X' from character 2, undisturbed 'c'"),
        (answer(text="ab"), "text"),
        (answer(completion_tokens=4), "completion_tokens 4 for 3 tokens"),
        (answer((1, 2)), "'length' after 2 of 3 tokens"),
        (answer(finish_reason=None), "finish_reason None"),
        (answer(finish_reason="stop"), "'stop' without a stop string"),
        (replace(answer(), prompt_tokens=6), "prompt_tokens 6, undisturbed 5"),
        (answer((1, 2, 3, 3)), "after 4 of 3 tokens"),
    ],
)
def test_what_is_wrong_is_said(got: Any, says: str) -> None:
    wrong = difference(request(), answer(), got)
    assert wrong is not None
    assert says in wrong


def test_a_stop_that_came_too_late_or_too_early() -> None:
    stopping = request(stop=("d",))
    assert "undisturbed none of 2" in str(difference(stopping, answer((1, 2), "ab", "stop"), answer((1, 2, 3))))
    assert "is none" in str(difference(stopping, answer(), answer((1, 2), "ab", "stop")))
    assert "a stop string is in the text" in str(difference(stopping, answer(), answer(text="abd")))
    assert "finish_reason 'stop'" in str(difference(stopping, answer(), answer(finish_reason="stop")))


def test_logprobs_may_differ_by_what_numerics_do() -> None:
    with_logprobs = request(logprobs=1)
    settled = answer(logprobs=(-0.1, -0.2, -0.3))
    assert difference(with_logprobs, settled, answer(logprobs=(-0.1, -0.2005, -0.3))) is None
    assert "logprob -0.4000 of token 2" in str(difference(with_logprobs, settled, answer(logprobs=(-0.1, -0.2, -0.4))))
    assert "2 logprobs for 3 tokens" in str(difference(with_logprobs, settled, answer(logprobs=(-0.1, -0.2))))


def test_unseeded_answers_are_judged_by_their_form() -> None:
    free = request(temperature=0.9)
    assert difference(free, answer(), answer((7, 8, 9), "xyz")) is None
    assert difference(free, answer(), answer((7, 8))) is not None
