"""Requests and answers for tests, by what matters in them."""

from __future__ import annotations

from typing import Any

from hycluster.chaos.ask import Reply, Said
from hycluster.chaos.requests import Ingress, Request
from hycluster.core import Sampling


def request(number: int = 0, *, ingress: Ingress = "http", chat: bool = False, **sampling: Any) -> Request:
    """One that is greedy, of at most 3 tokens, unless said otherwise."""
    return Request(number, ingress, chat, "hello", Sampling(**{"max_tokens": 3, "temperature": 0.0, **sampling}))


def answer(
    token_ids: tuple[int, ...] = (1, 2, 3),
    text: str = "abc",
    finish_reason: str | None = "length",
    *,
    logprobs: tuple[float, ...] | None = None,
    times: int = 1,
    completion_tokens: int | None = None,
) -> Reply:
    """The same for each of the ``times`` answers."""
    said = (Said(text, token_ids, finish_reason, logprobs),) * times
    return Reply(said, 5, times * len(token_ids) if completion_tokens is None else completion_tokens)
