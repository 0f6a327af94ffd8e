"""The reference against outputs of Tencent's own code, where a folder with them is at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.hunyuan_reference import MUTATIONS, Mutation, Reference

CHECKOUT = Path(__file__).parents[2]
GOLDEN = Path(os.environ.get("HYCLUSTER_GOLDEN") or CHECKOUT.parent / "shared" / "golden")
NAMES = ["ckpt", "ckpt_nocla"]
# The house's CI fails without them.
without_golden = pytest.mark.skipif(
    not GOLDEN.is_dir() and os.environ.get("CI") != "true",
    reason="no recorded outputs; name their folder in HYCLUSTER_GOLDEN",
)
pytestmark = without_golden


def recorded(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return json.loads((GOLDEN / f"{name}.json").read_text()), dict(arrays)


@pytest.mark.parametrize("name", NAMES)
def test_same_tokens_and_logprobs_as_tencents_code(name: str) -> None:
    told, arrays = recorded(name)
    reference = Reference.load(GOLDEN / name)
    assert told["prompts"]
    for i, prompt in enumerate(told["prompts"]):
        ids, logprobs, _ = reference.greedy(prompt, len(told["greedy_nocache"][i]))
        assert ids == told["greedy_nocache"][i]
        np.testing.assert_allclose(logprobs, arrays[f"p{i}_greedy_logprobs"], atol=2e-4)
        np.testing.assert_allclose(reference.prompt_logprobs(prompt), arrays[f"p{i}_prompt_logprobs"], atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_mistakes_that_apply_would_be_seen(name: str, mutation: Mutation) -> None:
    told, arrays = recorded(name)
    config = json.loads((GOLDEN / name / "config.json").read_text())
    applies = {
        "shared_finished_key": config["use_cla"],
        "norm_before_rope": config["use_qk_norm"],
        "renormalized_top1": config["moe_topk"] == 1,
        "no_alpha": bool(config.get("rope_scaling")),
        "float32_rope": not config.get("rope_scaling"),
    }
    longest = max(range(len(told["prompts"])), key=lambda i: len(told["prompts"][i]))
    logprobs = Reference.load(GOLDEN / name, mutation).prompt_logprobs(told["prompts"][longest])
    off = np.abs(logprobs - arrays[f"p{longest}_prompt_logprobs"]).max()
    assert off > 0.1 if applies[mutation] else off < 2e-4
