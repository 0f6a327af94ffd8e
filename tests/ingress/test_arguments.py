"""Wrong arguments of the Python client are refused by name, before anything is sent."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from hycluster.client import Client, _request
from hycluster.core import Generation, Output, Priority
from hycluster.errors import InvalidInput
from hycluster.ingress.proto import inference_pb2 as pb

ALLOWED = "is not allowed; must be"
CHAT = [{"role": "user", "content": "x"}]


@pytest.fixture
def client() -> Any:
    # Nobody is there: what is refused never gets so far.
    return Client("127.0.0.1:1")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompt": 5}, f"prompt: 5 {ALLOWED} a string"),
        ({"prompt": b"x"}, f"prompt: b'x' {ALLOWED} a string"),
        ({"prompt": ["x"]}, f"prompt: ['x'] {ALLOWED} a string"),
        ({"messages": "hi"}, f"messages: 'hi' {ALLOWED} a list of messages"),
        ({"messages": {"role": "user"}}, f"messages: {{'role': 'user'}} {ALLOWED} a list of messages"),
        ({"messages": ["hi"]}, f"messages[0]: 'hi' {ALLOWED} a dict with 'role' and 'content'"),
        ({"messages": [{"rol": "user"}]}, "messages[0].rol: unknown key; did you mean 'role'?"),
        ({"messages": [{"role": "user", "content": 5}]}, f"messages[0].content: 5 {ALLOWED} a string"),
        ({"messages": [{"content": "x"}]}, f"messages[0].role: None {ALLOWED} a string that is not empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            f"messages[0].content[0].type: 'video' {ALLOWED} 'text' or 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            f"messages[0].content[0].image_url: 'x' {ALLOWED} a dict with 'url'",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]},
            f"messages[0].tool_calls[0]: {{'id': 'c'}} {ALLOWED} a dict with 'id' and 'function'",
        ),
        (
            {"messages": CHAT, "tools": [{"function": {"name": ""}}]},
            f"tools[0].function.name: '' {ALLOWED} a string that is not empty",
        ),
        (
            {"messages": CHAT, "tools": [{"function": {"name": "f", "parameter": {}}}]},
            "tools[0].function.parameter: unknown key; did you mean 'parameters'?",
        ),
        ({"messages": CHAT, "reasoning_effort": 5}, f"reasoning_effort: 5 {ALLOWED} a string"),
        ({"messages": CHAT, "parallel_tool_calls": "no"}, f"parallel_tool_calls: 'no' {ALLOWED} true or false"),
        ({"token_ids": "abc"}, f"token_ids: 'abc' {ALLOWED} a list of token ids"),
        ({"token_ids": 5}, f"token_ids: 5 {ALLOWED} a list of token ids"),
        ({"token_ids": [1, 1.5]}, f"token_ids[1]: 1.5 {ALLOWED} a whole number from 0 to 4294967295"),
        ({"token_ids": [-1]}, f"token_ids[0]: -1 {ALLOWED} a whole number from 0 to 4294967295"),
        ({"token_ids": [True]}, f"token_ids[0]: True {ALLOWED} a whole number from 0 to 4294967295"),
        ({"max_tokens": "5"}, f"sampling.max_tokens: '5' {ALLOWED} a whole number"),
        ({"max_tokens": 1.0}, f"sampling.max_tokens: 1.0 {ALLOWED} a whole number"),
        ({"max_tokens": 2**40}, "sampling.max_tokens: Value out of range: 1099511627776"),
        ({"n": True}, f"sampling.n: True {ALLOWED} a whole number"),
        ({"temperature": "hot"}, f"sampling.temperature: 'hot' {ALLOWED} a number"),
        ({"stop": 5}, f"sampling.stop: 5 {ALLOWED} a tuple of strings"),
        ({"stop": [5]}, f"sampling.stop: [5] {ALLOWED} a tuple of strings"),
        ({"stop_token_ids": ["x"]}, f"sampling.stop_token_ids: ['x'] {ALLOWED} a tuple of whole numbers"),
        ({"ignore_eos": "no"}, f"sampling.ignore_eos: 'no' {ALLOWED} true or false"),
        ({"sampling": {"n": 1}}, f"sampling: {{'n': 1}} {ALLOWED} a hycluster.core.Sampling"),
        ({"priority": "BATCH"}, f"priority: 'BATCH' {ALLOWED} one of Priority.ONLINE, Priority.BATCH"),
        ({"request_id": 5}, f"request_id: 5 {ALLOWED} a string"),
        ({"session_id": b"5"}, f"session_id: b'5' {ALLOWED} a string"),
        ({"timeout_s": "5"}, f"timeout_s: '5' {ALLOWED} a number of seconds"),
        ({"timeout_s": -1}, f"timeout_s: -1 {ALLOWED} a number of seconds"),
        ({"max_token": 5}, "max_token: unknown argument; did you mean 'max_tokens'? (allowed: "),
        ({"colour": 5}, "colour: unknown argument (allowed: "),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_wrong_argument_is_named(client: Any, method: str, wrong: dict[str, Any], says: str) -> None:
    asked = wrong if wrong.keys() & {"prompt", "messages", "token_ids"} else {"prompt": "x", **wrong}
    with pytest.raises(InvalidInput, match=f"^{re.escape(says)}"):
        getattr(client, method)("m", **asked)


@pytest.mark.parametrize(
    ("method", "wrong", "says"),
    [
        ("generate", {"model": None, "prompt": "x"}, f"model: None {ALLOWED} a string"),
        ("tokenize", {"model": "m", "prompt": 5}, f"prompt: 5 {ALLOWED} a string"),
        ("tokenize", {"model": "m", "prompt": "x", "timeout_s": "5"}, f"timeout_s: '5' {ALLOWED} a number of seconds"),
        ("tokenize", {"model": 5, "prompt": "x"}, f"model: 5 {ALLOWED} a string"),
        ("count_tokens", {"model": "m", "texts": "x"}, f"texts: 'x' {ALLOWED} a list of strings, not one string"),
        ("count_tokens", {"model": "m", "texts": ["x", 5]}, f"texts[1]: 5 {ALLOWED} a string"),
    ],
)
def test_so_do_the_other_methods(client: Any, method: str, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{re.escape(says)}"):
        getattr(client, method)(**wrong)


def test_what_is_none_is_as_if_it_were_not_given() -> None:
    every = dict.fromkeys(("messages", "token_ids", "sampling", "priority", "n", "stop", "ignore_eos", "timeout_s"))
    assert _request("m", {"prompt": "x", **every}) == _request("m", {"prompt": "x"})  # type: ignore[typeddict-item]


def test_what_counts_as_a_number_of_another_library_is_one() -> None:
    asked = _request("m", {"token_ids": np.arange(3), "max_tokens": np.int64(5), "temperature": np.float32(0.5)})  # type: ignore[typeddict-item]
    assert (list(asked.token_ids.ids), asked.sampling.max_tokens, asked.sampling.temperature) == ([0, 1, 2], 5, 0.5)
    assert _request("m", {"prompt": "x", "temperature": 1}).sampling.temperature == 1.0


def test_a_list_does_for_a_tuple() -> None:
    assert list(_request("m", {"prompt": "x", "stop": ["a", "b"]}).sampling.stop) == ["a", "b"]
    assert _request("m", {"prompt": "x", "priority": Priority.BATCH}).priority == pb.BATCH


def test_the_text_of_an_answer() -> None:
    outputs = [Output(1, "b", [1]), Output(0, "a", [0])]
    assert Generation("r", "m", outputs).text == "a"
    assert Generation("r", "m", outputs[:1]).text == ""
    assert Generation("r", "m", []).text == ""
