from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hycluster.config import Hardware, Model, Parallel, Simulated
from hycluster.engine.arguments import GIB, engine_arguments, engine_environment, model_files
from hycluster.errors import SettingsError


def model(**fields: Any) -> Model:
    return Model(**({"name": "m", "source": "/folder"} | fields))


GPU = Hardware(accelerator="H100", cpus=4)


@pytest.mark.parametrize(
    ("argument", "setting"),
    [
        ("model", "source"),
        ("served_model_name", "name"),
        ("tensor_parallel_size", "parallel.tensor"),
        ("pipeline_parallel_size", "parallel.pipeline"),
        ("data_parallel_size", "parallel.data"),
        ("enable_expert_parallel", "parallel.expert"),
    ],
)
def test_what_the_settings_own_is_refused(argument: str, setting: str) -> None:
    with pytest.raises(SettingsError, match=rf"^models: m: engine\.{argument}: is set by '{setting}'"):
        engine_arguments(model(engine={argument: 1}), "/folder")


def test_what_the_settings_say_reaches_the_engine() -> None:
    arguments = engine_arguments(
        model(parallel=Parallel(tensor=2, pipeline=3, expert=True), hardware=GPU), "/elsewhere"
    )
    assert arguments == {
        "model": "/elsewhere",
        "served_model_name": ["m"],
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "data_parallel_size": 1,
        "enable_expert_parallel": True,
        "scheduling_policy": "priority",
    }


def test_data_parallel_engines_are_refused_for_now() -> None:
    with pytest.raises(SettingsError, match=r"^models: m: parallel\.data: 2 is not allowed; must be 1"):
        engine_arguments(model(parallel=Parallel(data=2)), "/folder")


def test_defaults_on_cpu() -> None:
    arguments = engine_arguments(model(hardware=Hardware(kv_cache_gib=0.5)), "/folder")
    assert arguments["dtype"] == "float32"
    assert arguments["enforce_eager"] is True
    assert arguments["distributed_executor_backend"] == "uni"
    assert arguments["kv_cache_memory_bytes"] == GIB // 2


def test_several_ranks_on_cpu_are_several_processes() -> None:
    assert engine_arguments(model(parallel=Parallel(tensor=2)), "/f")["distributed_executor_backend"] == "mp"


def test_the_settings_own_engine_arguments_win() -> None:
    arguments = engine_arguments(model(engine={"dtype": "bfloat16", "max_num_seqs": 3}), "/folder")
    assert (arguments["dtype"], arguments["max_num_seqs"]) == ("bfloat16", 3)


@pytest.mark.parametrize(("cpus", "threads"), [(0.2, "1"), (1, "1"), (2.9, "2"), (8, "8")])
def test_threads_on_cpu(cpus: float, threads: str) -> None:
    environment = engine_environment(model(hardware=Hardware(cpus=cpus)))
    assert environment["OMP_NUM_THREADS"] == threads
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_preloaded_libraries_exist() -> None:
    preloaded = engine_environment(model())["LD_PRELOAD"].split(":")
    assert all(Path(library).is_file() for library in preloaded)
    assert any("libgomp" in os.path.basename(library) for library in preloaded)


@pytest.mark.parametrize("other", [{"hardware": GPU}, {"simulated": Simulated()}])
def test_only_engines_on_cpu_get_the_cpu_environment(other: dict[str, Any]) -> None:
    assert not {"OMP_NUM_THREADS", "LD_PRELOAD"} & engine_environment(model(**other)).keys()


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({}, {"weights", "tokenizer"}),
        ({"engine": {"load_format": "dummy"}}, {"tokenizer"}),
        ({"simulated": Simulated()}, {"tokenizer"}),
        ({"engine": {"tokenizer": "elsewhere"}}, {"weights"}),
        ({"engine": {"skip_tokenizer_init": True}}, {"weights"}),
        ({"engine": {"load_format": "dummy", "tokenizer": "elsewhere"}}, set()),
    ],
)
def test_files_that_a_model_needs(tmp_path: Path, fields: dict[str, Any], missing: set[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    asked = model(source=str(tmp_path), **fields)
    if not missing:
        assert model_files(asked) == str(tmp_path)
        return
    with pytest.raises(SettingsError) as caught:
        model_files(asked)
    assert {what for what in ("weights", "tokenizer") if what in caught.value.message} == missing
