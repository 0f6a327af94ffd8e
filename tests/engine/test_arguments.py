from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hycluster.engine.arguments import GIB, check_platform, engine_arguments, engine_environment, executor, model_files
from hycluster.engine.protocol import GroupRank
from hycluster.errors import SettingsError
from hycluster.settings.model import Model
from hycluster.settings.parallel import Eplb, Parallel
from hycluster.settings.pool import Hardware
from hycluster.settings.simulated import Simulated


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
        ("kv_offloading_size", "hardware.kv_offload_gib"),
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
        "enable_expert_parallel": True,
        "distributed_executor_backend": "mp",
        "scheduling_policy": "priority",
    }


def test_a_rank_knows_its_group_and_a_gateway_does_not() -> None:
    asked = model(parallel=Parallel(data=4, expert=True))
    rank = engine_arguments(asked, "/folder", GroupRank(rank=3, size=4, host="10.0.0.1", port=99))
    assert rank["data_parallel_size"] == 4
    assert rank["data_parallel_rank"] == 3
    assert rank["data_parallel_address"] == "10.0.0.1"
    assert not [argument for argument in engine_arguments(asked, "/folder") if argument.startswith("data_parallel")]


@pytest.mark.parametrize(
    ("parallel", "hardware", "engine", "chosen"),
    [
        (Parallel(), Hardware(), {}, "uni"),
        (Parallel(data=4), GPU, {}, "uni"),
        (Parallel(tensor=2), Hardware(), {}, "mp"),
        (Parallel(tensor=8, data=2), GPU, {}, "mp"),
        (Parallel(tensor=8, pipeline=2), GPU, {}, "ray"),
        (Parallel(tensor=4), Hardware(accelerator="H20", gpus_per_node=2), {}, "ray"),
        (Parallel(tensor=16), Hardware(), {}, "mp"),
        (Parallel(tensor=2), GPU, {"distributed_executor_backend": "ray"}, "ray"),
    ],
)
def test_ranks_that_fit_a_node_are_processes(
    parallel: Parallel, hardware: Hardware, engine: dict[str, Any], chosen: str
) -> None:
    asked = model(parallel=parallel, hardware=hardware, engine=engine)
    assert executor(asked) == chosen
    assert engine_arguments(asked, "/folder")["distributed_executor_backend"] == chosen


def test_a_pipeline_on_cpu_has_a_worker_of_its_own() -> None:
    cut = Parallel(pipeline=2)
    on_cpu = engine_arguments(model(parallel=cut), "/folder")
    assert on_cpu["worker_cls"] == "hycluster.engine.patches.cpu_pipeline.PipelineWorker"
    assert "worker_cls" not in engine_arguments(model(parallel=cut, hardware=GPU), "/folder")
    assert "worker_cls" not in engine_arguments(model(parallel=Parallel(tensor=2)), "/folder")


BALANCED = Parallel(
    data=4, expert=True, eplb=Eplb(enabled=True, redundant_experts=4, window_size=100, step_interval=500)
)


def test_load_balancing_is_passed_on() -> None:
    asked = model(parallel=BALANCED, hardware=GPU)
    arguments = engine_arguments(asked, "/folder", GroupRank(0, 4, "h", 1))
    assert arguments["enable_eplb"] is True
    assert arguments["eplb_config"] == {"num_redundant_experts": 4, "window_size": 100, "step_interval": 500}
    assert "enable_eplb" not in engine_arguments(asked, "/folder"), "a gateway has no experts to balance"
    one = model(parallel=Parallel(tensor=4, expert=True, eplb=Eplb(enabled=True)), hardware=GPU)
    assert engine_arguments(one, "/folder")["enable_eplb"] is True


def test_load_balancing_is_refused_on_cpu() -> None:
    with pytest.raises(
        SettingsError, match=r"^models: m: parallel\.eplb\.enabled: true is not allowed on CPU; [^\n]*$"
    ):
        engine_arguments(model(parallel=BALANCED), "/folder")


def test_defaults_on_cpu() -> None:
    arguments = engine_arguments(model(hardware=Hardware(kv_cache_gib=0.5)), "/folder")
    assert arguments["dtype"] == "float32"
    assert arguments["enforce_eager"] is True
    assert arguments["distributed_executor_backend"] == "uni"
    assert arguments["kv_cache_memory_bytes"] == GIB // 2


def test_several_ranks_on_cpu_are_several_processes() -> None:
    assert engine_arguments(model(parallel=Parallel(tensor=2)), "/f")["distributed_executor_backend"] == "mp"


def test_routing_settings_travel_beside_what_else_is_there() -> None:
    recycled = model(routing={"recycle": {"capacity_factor": 1.5}}, engine={"additional_config": {"other": 1}})
    assert engine_arguments(recycled, "/folder")["additional_config"] == {
        "other": 1,
        "hycluster": {
            "routing": {
                "recycle": {"capacity_factor": 1.5, "min_capacity_tokens": 1, "seed": 0},
                "expert_metrics": False,
            }
        },
    }
    assert "additional_config" not in engine_arguments(model(routing={"expert_metrics": False}), "/folder")


def test_routing_settings_have_one_place() -> None:
    given = model(engine={"additional_config": {"hycluster": {}}})
    with pytest.raises(SettingsError, match=r"^models: m: engine\.additional_config\.hycluster: is set by 'routing'"):
        engine_arguments(given, "/folder")


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


class TestKvOffload:
    HARDWARE = Hardware(kv_offload_gib=0.5)

    def test_none_by_default(self) -> None:
        assert "kv_transfer_config" not in engine_arguments(model(), "/folder")

    def test_on_a_cpu_the_store_is_ours(self) -> None:
        connector = engine_arguments(model(hardware=self.HARDWARE), "/folder")["kv_transfer_config"]
        assert connector["kv_connector"] == "OffloadingConnector"
        assert connector["kv_connector_extra_config"] == {
            "cpu_bytes_to_use": GIB // 2,
            "spec_name": "HostOffloadingSpec",
            "spec_module_path": "hycluster.engine.patches.kv_offload",
        }

    def test_on_a_gpu_it_is_vllms(self) -> None:
        hardware = Hardware(accelerator="H20", kv_offload_gib=64)
        connector = engine_arguments(model(hardware=hardware), "/folder")["kv_transfer_config"]
        assert connector["kv_connector_extra_config"] == {"cpu_bytes_to_use": 64 * GIB}

    @pytest.mark.parametrize(
        ("engine", "why"),
        [
            ({"kv_transfer_config": {}}, "can't be together with engine.kv_transfer_config"),
            ({"enable_prefix_caching": False}, "needs prefix caching"),
        ],
    )
    def test_what_would_leave_it_without_effect(self, engine: dict[str, Any], why: str) -> None:
        with pytest.raises(SettingsError, match=rf"^models: m: hardware\.kv_offload_gib: {why}"):
            engine_arguments(model(hardware=self.HARDWARE, engine=engine), "/folder")


class TestWhatNeedsAGpu:
    @pytest.mark.parametrize("quantization", ["fp8", "fp8_per_tensor", "fp8_per_channel"])
    def test_quantizations(self, quantization: str) -> None:
        refused = rf"^models: m: engine\.quantization: '{quantization}' needs a GPU$"
        with pytest.raises(SettingsError, match=refused):
            check_platform(model(engine={"quantization": quantization}), None)
        with pytest.raises(SettingsError, match=refused):
            # As vLLM finds it in a checkpoint.
            check_platform(model(), quantization)
        check_platform(model(hardware=GPU), quantization)
        check_platform(model(simulated=Simulated()), quantization)

    def test_looking_ngrams_up_there(self) -> None:
        speculative = {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 3}}
        with pytest.raises(SettingsError, match=r"'ngram_gpu' needs a GPU; on CPU take 'ngram'$"):
            check_platform(model(engine=speculative), None)
        check_platform(model(engine=speculative, hardware=GPU), None)

    def test_the_rest_is_vllms_to_judge(self) -> None:
        check_platform(model(engine={"quantization": "experts_int8", "speculative_config": {"method": "ngram"}}), None)
        check_platform(model(), "compressed-tensors")
