from __future__ import annotations

import pytest

from hycluster.planning.architecture import Architecture
from hycluster.planning.families import architecture
from hycluster.planning.precision import Precision, precision_of
from hycluster.planning.rules import refusals, remarks
from hycluster.settings.parallel import Eplb, Parallel
from tests.planning.configs import published, shape

SMALL_QWEN = architecture(published("llama-3.1-8b") | {"num_attention_heads": 28, "num_key_value_heads": 4})
FP8_QWEN = Precision("fp8", block=(128, 128))


@pytest.mark.parametrize(
    ("model", "parallel", "precision", "reason"),
    [
        (SMALL_QWEN, Parallel(tensor=8), Precision(), "tensor 8: 28 query heads are not divisible by 8"),
        (
            architecture(
                published("llama-3.1-8b")
                | {"num_attention_heads": 30, "num_key_value_heads": 10, "intermediate_size": 14400}
            ),
            Parallel(tensor=6),
            Precision(),
            "tensor 6: 10 KV heads can neither be divided among 6 ranks nor copied evenly",
        ),
        (
            shape("qwen3-235b-a22b"),
            Parallel(tensor=8),
            FP8_QWEN,
            (
                "tensor 8: expert FFN of width 1536 leaves 192 channels a rank, no multiple of the 128 that share a"
                " scale in this FP8 checkpoint"
            ),
        ),
        (
            shape("deepseek-v2-lite"),
            Parallel(tensor=8, data=3),
            Precision(),
            "tensor x data 24: expert FFN of width 1408 is not divisible by 24",
        ),
        (
            architecture(published("llama-3.1-8b") | {"intermediate_size": 14340}),
            Parallel(tensor=8),
            Precision(),
            "tensor 8: FFN of width 14340 is not divisible by 8",
        ),
        (
            shape("hunyuan-large"),
            Parallel(tensor=8, data=4, expert=True),
            Precision(),
            (
                "expert over 32 ranks: 16 experts leave 16 of them without any; needs"
                " parallel.eplb.redundant_experts of at least 16"
            ),
        ),
        (
            shape("hunyuan-large"),
            Parallel(tensor=8, data=4, expert=True, eplb=Eplb(enabled=True, redundant_experts=8)),
            Precision(),
            (
                "expert over 32 ranks: 24 experts with 8 copies leave 8 of them without any; needs"
                " parallel.eplb.redundant_experts of at least 16"
            ),
        ),
        (
            shape("hunyuan-large"),
            Parallel(tensor=4, data=3, expert=True, eplb=Eplb(enabled=True)),
            Precision(),
            "expert over 12 ranks: 16 experts with their copies are not divisible by 12, as EPLB needs",
        ),
        (shape("llama-3.1-8b"), Parallel(expert=True), Precision(), "expert: this model has no routed experts"),
        (
            shape("llama-3.1-8b"),
            Parallel(data=2),
            Precision(),
            "data 2: without routed experts such ranks share nothing; use replicas",
        ),
        (
            shape("hunyuan-large"),
            Parallel(pipeline=3),
            Precision(),
            "pipeline 3: a stage would begin between layers that share keys and values",
        ),
        (shape("deepseek-v2-lite"), Parallel(pipeline=28), Precision(), "pipeline 28: there are 27 layers"),
    ],
)
def test_what_cannot_work_has_its_reason(
    model: Architecture, parallel: Parallel, precision: Precision, reason: str
) -> None:
    assert refusals(model, parallel, precision) == [reason]


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("hunyuan-large", Parallel(tensor=8, data=2, expert=True)),
        ("hunyuan-large", Parallel(tensor=16)),
        ("hunyuan-large", Parallel(tensor=8, data=4, expert=True, eplb=Eplb(enabled=True, redundant_experts=16))),
        ("hunyuan-large", Parallel(tensor=4, data=3, expert=True)),
        ("llama-3.1-405b", Parallel(tensor=8, pipeline=2)),
        ("llama-3.1-70b", Parallel(tensor=16)),
        ("deepseek-v3", Parallel(tensor=16)),
        ("deepseek-v3", Parallel(data=16, expert=True)),
        ("qwen3-235b-a22b", Parallel(tensor=8, expert=True)),
    ],
)
def test_what_is_known_to_work_is_not_refused(name: str, parallel: Parallel) -> None:
    assert refusals(shape(name), parallel, precision_of(published(name))) == []


@pytest.mark.parametrize(
    ("name", "parallel", "says"),
    [
        (
            "qwen3-235b-a22b",
            Parallel(tensor=8),
            "8 tensor ranks share 4 KV heads: each, with its cache, is there 2",
        ),
        ("deepseek-v3", Parallel(tensor=8), "each of the 8 tensor ranks holds the whole latent KV cache"),
        ("hunyuan-large", Parallel(data=3, expert=True), "16 experts over 3 ranks: the fullest ranks hold 6,"),
        ("gpt-oss-20b", Parallel(), "12 of 24 layers keep only the last 128 tokens"),
    ],
)
def test_what_is_worth_knowing_is_said(name: str, parallel: Parallel, says: str) -> None:
    (remark,) = remarks(shape(name), parallel)
    assert remark.startswith(says)


def test_nothing_is_said_of_a_plain_layout() -> None:
    assert remarks(shape("hunyuan-large"), Parallel(tensor=8, data=2, expert=True)) == []
