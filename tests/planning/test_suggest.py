"""Settings for a model of which only the source is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hycluster.errors import SettingsError
from hycluster.planning.machine import Available, gpu_called
from hycluster.planning.suggest import callers_name, suggest
from hycluster.settings.model import Model
from hycluster.settings.read import load_settings, validate
from hycluster.settings.settings import Settings
from tests.planning.configs import published


def gpus(kind: str, count: int, memory_gib: float | None = None, cpus: int = 16) -> Available:
    return Available("here", cpus, 100.0, gpu_called(kind, memory_gib), kind, count, count, alone=True)


def laptop(free_gib: float, cpus: int = 8) -> Available:
    return Available("here", cpus, free_gib, alone=True)


def made(config: str | dict[str, Any], hardware: Available) -> Model:
    config = published(config) if isinstance(config, str) else config
    return validate(Settings, suggest("org/model", config, hardware).settings, "here").models[0]


def test_a_model_that_fits_one_gpu_gets_a_replica_on_each() -> None:
    model = made("llama-3.1-8b", gpus("H200", 8))
    assert (model.parallel.devices, model.replicas.min, model.engine["max_model_len"]) == (1, 8, 131072)
    assert model.name == model.source == "org/model"


def test_the_whole_context_on_two_gpus_goes_before_part_of_it_on_one() -> None:
    model = made("llama-3.1-8b", gpus("L4", 4))
    assert (model.parallel.tensor, model.replicas.min, model.engine["max_model_len"]) == (2, 2, 131072)


def test_a_context_that_does_not_fit_is_cut_and_said_so() -> None:
    suggested = suggest("org/model", published("llama-3.1-8b"), gpus("L4", 1))
    assert suggested.settings["models"][0]["engine"]["max_model_len"] == 8192
    assert "max_model_len 8192: of the model's 131072 tokens no more fit" in suggested.text("x")


def test_a_gpu_that_no_table_has_counts_by_its_memory() -> None:
    model = made("llama-3.1-8b", gpus("GeForce-RTX-9090", 1, memory_gib=48))
    assert (model.hardware.accelerator, model.engine["max_model_len"]) == ("GeForce-RTX-9090", 131072)


def test_what_fits_no_gpu_is_refused_with_the_missing_memory() -> None:
    with pytest.raises(SettingsError, match=r"32\.9 GiB of weights .* a L4 has room for 16\.2 GiB"):
        made("llama-3.1-70b", gpus("L4", 4))


def test_a_cpu_gets_float32_and_what_its_memory_allows() -> None:
    model = made("qwen3-8b", laptop(60, cpus=8))
    # 30.5 GiB of weights, 288 KiB of KV cache a token.
    assert model.hardware.accelerator is None
    assert (model.hardware.cpus, model.engine["max_model_len"]) == (7, 4096)
    assert 1.125 <= model.hardware.kv_cache_gib <= 60 - 30.5 - 3
    with pytest.raises(SettingsError, match=r"memory: .* take 30\.5 GiB in float32.* 20\.0 GiB of memory free"):
        made("qwen3-8b", laptop(20))


@pytest.mark.parametrize("free_gib", [33.7, 34.0, 34.3, 35.0])
def test_the_kv_cache_on_a_cpu_holds_a_whole_sequence_and_leaves_the_rest(free_gib: float) -> None:
    model = made("qwen3-8b", laptop(free_gib))
    one_gib, weights_gib = model.engine["max_model_len"] * 288 / 2**20, 30.513
    assert one_gib <= model.hardware.kv_cache_gib <= free_gib - weights_gib - 3 + 0.01


@pytest.mark.parametrize("hardware", [laptop(16), gpus("L4", 2)], ids=["cpu", "gpu"])
def test_a_kind_of_model_that_is_not_counted_is_served_as_vllm_finds_it(hardware: Available) -> None:
    config = {"model_type": "new_kind", "text_config": {"max_position_embeddings": 100000}}
    suggested = suggest("org/model", config, hardware)
    model = validate(Settings, suggested.settings, "here").models[0]
    assert "'new_kind' is unknown to the planner" in suggested.text("x")
    assert model.engine == ({} if hardware.gpu else {"max_model_len": 4096})
    assert (model.hardware.accelerator, model.parallel.devices) == (hardware.accelerator, 1)


def test_a_cluster_listens_for_others_and_a_machine_does_not() -> None:
    there = Available("the Ray cluster", 8, 60, alone=False)
    hosts = [
        validate(Settings, suggest("o/m", published("qwen3-8b"), one).settings, "x").http.host
        for one in (there, laptop(60))
    ]
    assert hosts == ["0.0.0.0", "127.0.0.1"]


def test_the_text_is_a_settings_file(tmp_path: Path) -> None:
    suggested = suggest("org/model", published("qwen3-30b-a3b"), gpus("L4", 4))
    path = tmp_path / "x.yaml"
    path.write_text(suggested.text("hycluster serve org/model"))
    assert load_settings(path) == validate(Settings, suggested.settings, "x")
    assert "# By `hycluster serve org/model`:\n#   here: 4 L4 of 22 GiB\n" in path.read_text()


def test_names(tmp_path: Path) -> None:
    folder = tmp_path / "Mein Modell (neu)"
    folder.mkdir()
    assert callers_name(str(folder)) == "Mein-Modell-neu-"
    assert callers_name("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
