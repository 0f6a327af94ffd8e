"""The model in a real vLLM against the reference: every shape, every layout, and every mistake that we know of."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hycluster.models import tiny
from hycluster.models.tiny import TinyShape
from hycluster.planning.families import architecture
from hycluster.planning.precision import Precision
from hycluster.planning.shares import device_share, kv_bytes_per_token
from hycluster.settings.parallel import Parallel
from tests.models.hunyuan_reference import Mutation, Reference
from tests.vllm_forks import VllmForks, cache_root

# The first test waits for all the engines.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("engine_outputs.py")
# Ids of ordinary tokens, in an order without a period; the third and fourth are longer than a chunk of the prefill,
# the last has a whole block to find in the prefix cache.
PROMPTS = [[(37 * i * i + 11 * i + 5 * length) % 500 for i in range(length)] for length in (1, 7, 33, 100, 250)]
TOKENS = 24
TOLERANCE = 2e-4
KV_CACHE_BYTES = 3 * 2**24


@dataclass(frozen=True)
class Case:
    shape: TinyShape
    stored: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)

    def reference(self, mutation: Mutation | None = None) -> Reference:
        weights = {name: tensor.float() for name, tensor in tiny.weights_of(self.shape).items()}
        return Reference(tiny.config_of(self.shape), weights, mutation)


LARGE = TinyShape(layers=6, seed=1)
CASES = {
    "large": Case(LARGE),
    "compiled": Case(LARGE, engine={"enforce_eager": False}),
    "bin": Case(TinyShape(layers=6, cla=False, topk=2, rope_alpha=0, seed=2), {"file_format": "bin"}),
    "unscaled": Case(
        TinyShape(layers=4, rope_alpha=0, shared_experts=2, seed=3), {"layout": "fused", "file_format": "bin"}
    ),
    "share-4": Case(
        TinyShape(layers=8, cla_share_factor=4, topk=2, kv_heads=1, seed=4),
        {"layout": "fused", "shard_mib": 1, "dtype": "float32"},
    ),
    "head-size": Case(
        TinyShape(layers=4, head_size=64, attention_bias=True, tied_embeddings=False, shared_experts=0, seed=5),
        {"layout": "fused"},
    ),
    "a13b": Case(
        TinyShape(architecture="hunyuan-a13b", layers=4, cla=False, topk=3, tied_embeddings=False, head_size=64, seed=6)
    ),
    "dense": Case(TinyShape(layers=4, experts=1, seed=7), {"shard_mib": 0.25}),
}
MISTAKES: list[tuple[str, Mutation]] = [
    ("large", "shared_finished_key"),
    ("share-4", "shared_finished_key"),
    ("large", "norm_before_rope"),
    ("a13b", "norm_before_rope"),
    ("large", "renormalized_top1"),
    ("large", "no_alpha"),
    ("a13b", "no_alpha"),
    ("bin", "float32_rope"),
    ("unscaled", "float32_rope"),
]


@pytest.fixture(scope="session")
def told(vllm_forks: VllmForks, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What vLLM says of every case, by name; see engine_outputs.py."""
    folder = tmp_path_factory.mktemp("hunyuan")
    engines = {}
    for name, case in CASES.items():
        model = tiny.write_checkpoint(folder / name, case.shape, **case.stored)
        engines[name] = {
            "model": str(model),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_batched_tokens": 64,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            **case.engine,
        }
    vllm_forks.run(
        SCRIPT,
        str(folder / "told.json"),
        asked=json.dumps({"prompts": PROMPTS, "tokens": TOKENS, "engines": engines}),
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_CACHE_ROOT": str(cache_root(folder))},
        timeout_s=580,
    )
    return json.loads((folder / "told.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_same_tokens_and_logprobs_as_the_reference(told: Any, name: str) -> None:
    reference = CASES[name].reference()
    for prompt, answer in zip(PROMPTS, told[name]["answers"], strict=True):
        ids, logprobs, gap = reference.greedy(prompt, TOKENS)
        assert gap > TOLERANCE, "the reference itself is undecided; another seed would do"
        assert answer["ids"] == ids
        assert answer["logprobs"] == pytest.approx(logprobs, abs=TOLERANCE)
        assert answer["prompt_logprobs"] == pytest.approx(reference.prompt_logprobs(prompt), abs=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_the_prefix_cache_changes_nothing(told: Any, name: str) -> None:
    first, again = told[name]["answers"], told[name]["again"]
    assert again[-1]["cached_tokens"] >= 128
    for one, other in zip(first, again, strict=True):
        assert other["ids"] == one["ids"]
        assert other["logprobs"] == pytest.approx(one["logprobs"], abs=TOLERANCE)


def test_sharing_by_two_holds_twice_the_tokens_in_the_same_bytes(told: Any) -> None:
    with_sharing, without = CASES["large"], CASES["bin"]
    assert (with_sharing.shape.cla, without.shape.cla) == (True, False)
    assert with_sharing.shape.layers == without.shape.layers
    assert told["large"]["kv_tokens"] == 2 * told["bin"]["kv_tokens"]
    # By the same arithmetic as the true configuration's 80 KiB a token.
    for case, name in ((with_sharing, "large"), (without, "bin")):
        token_bytes = kv_bytes_per_token(architecture(tiny.config_of(case.shape)), "float32")
        assert told[name]["kv_tokens"] * token_bytes == KV_CACHE_BYTES


def test_what_a_step_reads_of_experts_is_known_by_the_loaded_weights(told: Any) -> None:
    for name, case in CASES.items():
        shape, (found,) = case.shape, told[name]["routed"]
        if shape.experts == 1:
            assert found is None
            continue
        assert (found["experts"], found["top_k"]) == (shape.experts, shape.topk)
        assert (found["held"], found["ranks"]) == (shape.experts, 1)
        whole = Precision("float32", "float32", "float32")
        share = device_share(architecture(tiny.config_of(shape)), Parallel(), whole)
        # The table of an embedding that is not the head's is no step's to read, but is counted here.
        expected = share.routed / (share.routed + share.read)
        assert 0.8 * expected < found["share"] < 1.02 * expected


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_a_mistake_would_be_seen(told: Any, name: str, mistake: Mutation) -> None:
    wrong = CASES[name].reference(mistake)
    off = [
        abs(ours - theirs)
        for prompt, answer in zip(PROMPTS, told[name]["answers"], strict=True)
        for ours, theirs in zip(wrong.prompt_logprobs(prompt), answer["prompt_logprobs"], strict=True)
    ]
    assert max(off) > 100 * TOLERANCE
