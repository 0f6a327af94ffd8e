"""From a model's settings to vLLM's configuration; no engine is started."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hycluster.engine.protocol import GroupRank
from hycluster.errors import SettingsError
from hycluster.models.tiny import TinyShape, write_checkpoint
from hycluster.settings.model import Model
from hycluster.settings.parallel import Eplb, Parallel
from hycluster.settings.pool import Hardware

pytestmark = pytest.mark.usefixtures("vllm_imported")

PLACE = GroupRank(rank=1, size=2, host="127.0.0.1", port=4321)


@pytest.fixture(scope="module")
def eight_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "model", TinyShape(layers=2, experts=8))


def config(folder: Path, parallel: Parallel, place: GroupRank | None = None, **hardware: Any) -> Any:
    from hycluster.engine.vllm import engine_config

    model = Model(
        name="m", source=str(folder), parallel=parallel, hardware=Hardware(**hardware), engine={"max_model_len": 256}
    )
    return engine_config(model, str(folder), place)


def test_a_rank_of_a_group(eight_experts: Path) -> None:
    parallel = config(eight_experts, Parallel(data=2, expert=True), PLACE).parallel_config
    assert (parallel.data_parallel_rank, parallel.data_parallel_size, parallel.data_parallel_rank_local) == (1, 2, 0)
    assert (parallel.data_parallel_master_ip, parallel._coord_store_port) == ("127.0.0.1", 4321)
    assert parallel.data_parallel_external_lb, "no rank's load goes to a coordinator"
    assert parallel.distributed_executor_backend == "uni"
    assert parallel.enable_expert_parallel


def test_a_gateway_of_a_group_has_no_part_in_it(eight_experts: Path) -> None:
    assert config(eight_experts, Parallel(data=2, expert=True)).parallel_config.data_parallel_size == 1


@pytest.mark.parametrize(
    ("parallel", "hardware", "says"),
    [
        (
            Parallel(tensor=3, data=3, expert=True),
            {},
            "parallel: tensor x data is 9; must be at most the model's 8 experts",
        ),
        (
            Parallel(data=2, expert=True, eplb=Eplb(enabled=True, redundant_experts=3)),
            {"accelerator": "H20"},
            (
                "parallel.eplb.redundant_experts: 3 is not allowed; with the model's 8 experts it must make a multiple"
                " of tensor x data (2)"
            ),
        ),
    ],
)
def test_cuts_that_the_experts_do_not_allow(
    eight_experts: Path, parallel: Parallel, hardware: dict[str, Any], says: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        config(eight_experts, parallel, PLACE, **hardware)
    assert caught.value.message == f"models: m: {says}"


@pytest.mark.parametrize(
    ("parallel", "place", "says"),
    [
        (Parallel(expert=True), None, "parallel.expert: true is not allowed; the model has no experts"),
        (
            Parallel(data=2),
            PLACE,
            (
                "parallel.data: 2 is not allowed; must be 1 for a model without experts"
                " (take more replicas: they share nothing)"
            ),
        ),
    ],
)
def test_models_without_experts(tiny_model: Path, parallel: Parallel, place: GroupRank | None, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        config(tiny_model, parallel, place)
    assert caught.value.message == f"models: m: {says}"


def test_a_model_that_takes_media_is_told_where_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins for vLLM's ``ModelConfig``: there is no such model that is small; the last is a real one."""
    from hycluster.engine.model_checks import check_media

    monkeypatch.delenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", raising=False)
    nothing: tuple[list[str] | None, ...] = (None, [])
    for none in nothing:
        asked = SimpleNamespace(supports_multimodal_inputs=True, allowed_media_domains=none)
        with pytest.raises(SettingsError, match=r"^models: m: engine\.allowed_media_domains: must be set"):
            check_media("m", asked)
    check_media("m", SimpleNamespace(supports_multimodal_inputs=True, allowed_media_domains=["media.example.org"]))
    assert os.environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"


def test_what_a_model_takes_is_where_it_is_looked_for(eight_experts: Path) -> None:
    model_config = config(eight_experts, Parallel()).model_config
    assert (model_config.supports_multimodal_inputs, model_config.allowed_media_domains) == (False, None)


def test_a_reasoning_parser_reaches_the_engine(eight_experts: Path) -> None:
    """Else what an output is to look like is asked of the reasoning, and there is no answer behind it."""
    from hycluster.engine.vllm import engine_config

    model = Model(name="m", source=str(eight_experts), api={"reasoning_parser": "qwen3"}, engine={"max_model_len": 256})
    assert engine_config(model, str(eight_experts)).structured_outputs_config.reasoning_parser == "qwen3"
