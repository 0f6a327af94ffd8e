"""The reference itself: its switches do what they say, and transformers' A13B agrees with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hycluster.models import tiny
from hycluster.models.tiny import TinyShape
from tests.models.hunyuan_reference import MUTATIONS, Mutation, Reference

PROMPT = [(37 * i * i + 11) % 500 for i in range(120)]
WITHOUT_CLA = TinyShape(layers=4, cla=False, topk=2)
# Where each mistake makes a difference.
APPLIES: dict[Mutation, TinyShape] = {
    "shared_finished_key": TinyShape(layers=4),
    "norm_before_rope": WITHOUT_CLA,
    "renormalized_top1": TinyShape(layers=4),
    "no_alpha": WITHOUT_CLA,
    "float32_rope": TinyShape(layers=4, rope_alpha=0),
}


def reference(shape: TinyShape, mutation: Mutation | None = None) -> Reference:
    weights = {name: tensor.float() for name, tensor in tiny.weights_of(shape).items()}
    return Reference(tiny.config_of(shape), weights, mutation)


def furthest(shape: TinyShape, mutation: Mutation) -> float:
    """Largest difference that a mistake makes in the prompt's log-probabilities."""
    right, wrong = (torch.tensor(reference(shape, m).prompt_logprobs(PROMPT)) for m in (None, mutation))
    return float((right - wrong).abs().max())


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_shows_where_it_applies(mutation: Mutation) -> None:
    assert furthest(APPLIES[mutation], mutation) > 0.1


@pytest.mark.parametrize("mutation", ["shared_finished_key", "renormalized_top1", "float32_rope"])
def test_a_mistake_that_does_not_apply_changes_nothing(mutation: Mutation) -> None:
    assert furthest(WITHOUT_CLA, mutation) == 0


def test_a_token_sees_only_what_is_before_it() -> None:
    model = reference(TinyShape(layers=4))
    torch.testing.assert_close(model.logits(PROMPT)[:50], model.logits(PROMPT[:50]), atol=2e-4, rtol=0)


def test_greedy_takes_the_best_token_each_time() -> None:
    model = reference(TinyShape(layers=4))
    ids, logprobs, gap = model.greedy(PROMPT, 5)
    assert gap > 0
    # As a prompt the same tokens have the same log-probabilities.
    assert model.prompt_logprobs(PROMPT + ids)[-5:] == pytest.approx(logprobs, abs=2e-4)
    assert ids == model.logits(PROMPT + ids).argmax(-1).tolist()[-6:-1]


def test_a_setting_may_be_a_list_with_one_for_each_layer() -> None:
    shape = TinyShape(layers=4, topk=2)
    model = reference(shape)
    listed = Reference({**model.config, "num_experts": [8] * 4, "moe_topk": [2] * 4}, model.weights)
    assert listed.prompt_logprobs(PROMPT) == model.prompt_logprobs(PROMPT)
    mixed = Reference({**model.config, "moe_topk": [2, 2, 1, 2]}, model.weights)
    assert mixed.prompt_logprobs(PROMPT) != pytest.approx(model.prompt_logprobs(PROMPT), abs=0.1)


@pytest.mark.filterwarnings("ignore")  # transformers' own, at its import and for fields that it does not know
def test_transformers_computes_the_same_for_a13b(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    # Other head sizes than hidden / heads, an output head of its own: all that A13B can have.
    shape = TinyShape(
        architecture="hunyuan-a13b",
        layers=4,
        cla=False,
        topk=2,
        head_size=64,
        attention_bias=True,
        tied_embeddings=False,
    )
    tiny.write_checkpoint(tmp_path / "model", shape, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.inference_mode():
        logits = theirs(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits, reference(shape).logits(PROMPT), atol=2e-3, rtol=0)
