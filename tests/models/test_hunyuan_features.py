"""vLLM's features on Hunyuan with cross-layer attention: adapters, KV offload, speculation, a long context."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hycluster.models import tiny
from hycluster.models.tiny import TinyShape
from tests.lora_adapters import Shapes, write_adapter
from tests.vllm_forks import VllmForks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).with_name("feature_outputs.py")
SHAPE = TinyShape(layers=4)
LONG = TinyShape(layers=2, hidden=64, intermediate=32, heads=2, kv_heads=1, experts=4, context_tokens=262_144)
RANK, ALPHA = 8, 16


def adapted_modules() -> Shapes:
    """All of attention, and the shared expert's dense layers. On CPU routed experts take no adapters."""
    queries, keys = SHAPE.heads * SHAPE.head_channels, SHAPE.kv_heads * SHAPE.head_channels
    shapes = {}
    for layer in range(SHAPE.layers):
        attention, shared = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp.shared_mlp"
        shapes[f"{attention}.q_proj"] = (SHAPE.hidden, queries)
        shapes[f"{attention}.o_proj"] = (queries, SHAPE.hidden)
        if SHAPE.has_own_kv(layer):
            shapes |= {f"{attention}.{part}_proj": (SHAPE.hidden, keys) for part in "kv"}
        shapes |= {f"{shared}.{part}_proj": (SHAPE.hidden, SHAPE.intermediate) for part in ("gate", "up")}
    return shapes


def merge(base: Path, adapter: Path, into: Path) -> Path:
    """The checkpoint whose weights have the adapter's added: what the adapter stands for."""
    weights = load_file(base / "model.safetensors")
    low = load_file(adapter / "adapter_model.safetensors")
    for path in adapted_modules():
        down, up = (low[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
        weights[f"{path}.weight"] += ALPHA / RANK * up @ down
    into.mkdir()
    for file in base.iterdir():
        if file.name != "model.safetensors":
            (into / file.name).write_bytes(file.read_bytes())
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    return into


@pytest.fixture(scope="module")
def told(vllm_forks: VllmForks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("features")
    base = tiny.write_checkpoint(folder / "base", SHAPE, dtype="float32")
    adapter = write_adapter(folder / "adapter", adapted_modules(), seed=1, rank=RANK, alpha=ALPHA)
    chance = random.Random(0)
    repeated = [[chance.randrange(10, 500) for _ in range(20)] * 15 for _ in range(4)]
    asked = {
        "base": str(base),
        "merged": str(merge(base, adapter, folder / "merged")),
        "long": str(tiny.write_checkpoint(folder / "long", LONG)),
        "adapter": str(adapter),
        "prompts": repeated,
    }
    told: dict[str, Any] = {}
    for question in (asked, {"base": str(base), "draft": str(base), "prompts": repeated}):
        out = folder / "told.json"
        environment = {"VLLM_NO_USAGE_STATS": "1"}
        vllm_forks.run(SCRIPT, str(out), asked=json.dumps(question), environment=environment, timeout_s=400)
        told |= json.loads(out.read_text())
    return told


def test_an_adapter_is_the_model_with_its_weights_added(told: dict[str, Any]) -> None:
    assert told["adapted"] == told["merged"]
    assert all(adapted != plain for adapted, plain in zip(told["adapted"], told["plain"], strict=True))


def test_a_batch_mate_without_an_adapter_stays_without(told: dict[str, Any]) -> None:
    assert told["without adapter"] == told["plain"]
    assert told["mixed"] == [told["adapted" if number % 2 else "plain"][number] for number in range(4)]


def test_offloaded_blocks_come_back_as_they_were_and_shared_layers_count_once(told: dict[str, Any]) -> None:
    assert told["offloaded"] == [told["plain"]] * 2
    tokens = 4 * 2 * 128
    assert told["tokens_from_host"] == tokens
    assert told["stored_bytes"] == tokens * told["kv_bytes_a_token"]
    # Half of the layers x 2 (K, V) x heads x channels x 4 bytes.
    assert told["kv_bytes_a_token"] == SHAPE.layers // 2 * 2 * SHAPE.kv_heads * SHAPE.head_channels * 4


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_speculation_changes_no_token(told: dict[str, Any], method: str) -> None:
    assert told[method] == told["plain"]
    if method == "draft":
        # It drafts for itself; random weights don't repeat what a prompt repeats.
        assert told["draft accepted"] > 0


def test_a_long_prompt_in_chunks_is_the_prompt_at_once(told: dict[str, Any]) -> None:
    """With room for 262,144 positions."""
    assert told["chunked"] == told["whole"]
