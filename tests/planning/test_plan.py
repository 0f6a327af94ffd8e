from __future__ import annotations

import json
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from hycluster.planning.gpus import gpu
from hycluster.planning.layouts import Pinned, Workload
from hycluster.planning.plan import Plan, as_json, make_plan
from hycluster.planning.precision import precision_of
from hycluster.planning.report import show_plan
from tests.planning.configs import PATHS, published


def plan_of(name: str, on: str = "H20", context: int = 8192, concurrency: int = 1, **precision: str) -> Plan:
    config = published(name)
    return make_plan(config, precision_of(config, **precision), gpu(on), Workload(context, concurrency))


def shown(plan: Plan, width: int = 200) -> str:
    console = Console(file=StringIO(), width=width)
    show_plan(plan, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", PATHS)
def test_json_has_it_all_in_plain_values(name: str) -> None:
    plan = plan_of(name, "H200")
    said: dict[str, Any] = json.loads(json.dumps(as_json(plan)))
    layout = said["layout"]
    cut = layout["parallel"]
    assert cut["tensor"] * cut["pipeline"] * cut["data"] == layout["gpus_per_replica"]
    assert layout["gpus"] == layout["gpus_per_replica"] * layout["replicas"]
    assert layout["sequences_per_replica"] >= 1
    assert said["model"]["parameters"] >= said["model"]["active_parameters"]
    assert said["bounds"]["decode_full"]["tokens_per_s"] >= said["bounds"]["decode_asked"]["tokens_per_s"]
    assert said["bounds"]["prefill_s"] > 0
    assert said["gpu"]["source"]


def test_the_report_says_what_the_plan_holds() -> None:
    text = shown(plan_of("hunyuan-large", context=131_072))
    for words in (
        "388.7 billion",
        "1 of 16 experts a token",
        "bfloat16 724.0 GiB, fp8 362.8 GiB",
        "80 KiB a token in bfloat16, 5.0% of full attention's",
        "10.0 GiB at 131,072 tokens",
        "smallest: 16 H20, 2 nodes, as a replica with tensor 8, data 2, expert",
        "9.4 GiB are missing on a GPU",
        "engine.cpu_offload_gb: 10 with tensor 8",
        "hardware.kv_offload_gib: each GiB of a rank keeps 13,107 tokens",
    ):
        assert words in text


def test_a_dense_model_is_told_without_experts() -> None:
    text = shown(plan_of("llama-3.1-8b", "L4", concurrency=64))
    assert "expert" not in text
    assert "replicas with" in text


def test_reasons_for_what_does_not_work_are_shown() -> None:
    config = published("llama-3.1-70b") | {"num_attention_heads": 60, "num_key_value_heads": 12, "head_dim": 128}
    plan = make_plan(config, precision_of(config), gpu("A100-40GB"), Workload(8192, 32))
    assert "does not work: tensor 8: 60 query heads are not divisible by 8" in shown(plan)


def test_fits_a_narrow_terminal() -> None:
    assert max(len(line) for line in shown(plan_of("hunyuan-large"), width=80).splitlines()) <= 80


def test_weights_that_the_checkpoint_does_not_hold_are_said() -> None:
    assert any("does not hold fp8" in remark for remark in plan_of("hunyuan-large", weights="fp8").remarks)
    assert plan_of("deepseek-v3", "H200").weights_bytes["fp8"] > 626 * 2**30
    (widened,) = plan_of("gpt-oss-20b", "A10").remarks[:1]
    assert widened.startswith("A10 is counted with 16-bit arithmetic for mxfp4 weights")


def test_alternatives_are_other_cuts() -> None:
    plan = plan_of("hunyuan-large")
    cuts = [(fit.parallel.tensor, fit.parallel.pipeline, fit.parallel.data) for fit in plan.alternatives]
    assert len(set(cuts)) == len(cuts) > 2
    assert (8, 1, 2) not in cuts


def test_pinned_layouts_are_planned_with() -> None:
    config = published("hunyuan-large")
    plan = make_plan(config, precision_of(config), gpu("H20"), Workload(8192, 1), Pinned(pipeline=2))
    assert plan.chosen.parallel.pipeline == 2
