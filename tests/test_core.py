from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from hycluster.core import GenerationRequest, Priority, Sampling
from hycluster.errors import InvalidInput


def test_defaults_are_allowed() -> None:
    assert Sampling().max_tokens is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1),
        ("temperature", 0),
        ("temperature", 100),
        ("top_p", 1),
        ("top_k", -1),
        ("top_k", 0),
        ("min_p", 0),
        ("min_p", 1),
        ("presence_penalty", -2),
        ("frequency_penalty", 2),
        ("repetition_penalty", 0.01),
        ("seed", -(2**63)),
        ("seed", 2**63 - 1),
        ("n", 1),
        ("n", 128),
        ("logprobs", 0),
        ("stop", ("a", " ")),
    ],
)
def test_values_at_the_edge_are_allowed(field: str, value: Any) -> None:
    assert getattr(Sampling(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", -5, "at least 1"),
        ("min_tokens", -1, "at least 0"),
        ("temperature", -0.1, "from 0 to 100"),
        ("temperature", float("nan"), "from 0 to 100"),
        ("temperature", float("inf"), "from 0 to 100"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_k", -2, "at least -1"),
        ("min_p", -0.1, "from 0 to 1"),
        ("min_p", 1.1, "from 0 to 1"),
        ("presence_penalty", 2.1, "from -2 to 2"),
        ("frequency_penalty", -2.1, "from -2 to 2"),
        ("repetition_penalty", 0, "above 0"),
        ("seed", 2**63, "a signed 64-bit number"),
        ("stop", ("a", ""), "strings that are not empty"),
        ("n", 0, "from 1 to 128"),
        ("n", 129, "from 1 to 128"),
        ("logprobs", -1, "at least 0"),
    ],
)
def test_what_is_not_allowed_is_named(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Sampling(**{field: value})
    assert str(refused.value) == f"sampling.{field}: {value!r} is not allowed; must be {allowed}"


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(InvalidInput, match=r"sampling\.min_tokens: 5 .* at most max_tokens \(4\)"):
        Sampling(max_tokens=4, min_tokens=5)
    assert Sampling(max_tokens=4, min_tokens=4).min_tokens == 4


def test_a_long_value_is_cut() -> None:
    with pytest.raises(InvalidInput) as refused:
        Sampling(stop=("x" * 10_000, ""))
    assert len(str(refused.value)) < 200


def test_nouns_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sampling().n = 2  # type: ignore[misc]


@pytest.mark.parametrize("given", [{"prompt": "hi"}, {"messages": [{"role": "user"}]}, {"token_ids": [0]}])
def test_one_input(given: dict[str, Any]) -> None:
    request = GenerationRequest(model="m", **given)
    assert request.priority is Priority.ONLINE


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "exactly one must be set; set are none"),
        ({"prompt": "a", "token_ids": [1]}, "exactly one must be set; set are prompt, token_ids"),
        ({"prompt": ""}, "prompt: must not be empty"),
        ({"messages": []}, "messages: must not be empty"),
        ({"token_ids": []}, "token_ids: must not be empty"),
    ],
)
def test_no_input_or_several(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        GenerationRequest(model="m", **given)


def test_online_goes_before_batch() -> None:
    assert Priority.ONLINE < Priority.BATCH


@pytest.mark.parametrize(
    "module",
    ["core", "errors", "settings.read", "gateway.router", "engine.protocol", "engine.simulated", "engine.timing"],
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, hycluster.{module}; sys.exit(' '.join({{'vllm', 'torch', 'ray'}} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
