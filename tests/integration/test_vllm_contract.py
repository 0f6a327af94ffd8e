"""What hycluster relies on inside vLLM 0.32.0. When one of these fails after an upgrade, read
``hycluster/engine/vllm.py``, ``hycluster/gateway/gateway.py`` and ``hycluster/gateway/pool.py`` beside its sources.

``docs/reaches.md`` lists all that is relied on. What is patched is watched beside each patch
(``tests/engine/patches``).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.sources import calls_on, set_on_self

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _quiet_import() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm.v1.engine.async_llm  # noqa: F401


def test_version() -> None:
    import vllm

    assert vllm.__version__.split("+")[0] == "0.32.0"


def test_gateway_sets_what_async_llm_sets() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    from hycluster.gateway.gateway import Gateway

    only_with_a_frontend_profiler = {"_frontend_profiler_worker_name"}
    missing = set_on_self(AsyncLLM.__init__) - set_on_self(Gateway.__init__) - only_with_a_frontend_profiler
    assert not missing


def test_who_left_is_known_to_nobody_but_the_gateway() -> None:
    """``Gateway.abort`` does what ``AsyncLLM.abort`` does, and counts: vLLM's loggers hear nothing of an abort."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor

    from hycluster.gateway.gateway import Gateway

    abort = inspect.getsource(AsyncLLM.abort)
    assert "self.output_processor.abort_requests(request_ids, internal)" in abort
    assert "self.engine_core.abort_requests_async(all_request_ids)" in abort
    assert abort.count("await ") == 1
    assert inspect.signature(AsyncLLM.abort).parameters.keys() == inspect.signature(Gateway.abort).parameters.keys()
    assert "stats.update" not in inspect.getsource(OutputProcessor.abort_requests)
    # A caller who leaves is what it is called for.
    assert "except (asyncio.CancelledError, GeneratorExit):" in inspect.getsource(AsyncLLM.generate)


def test_pool_offers_what_async_llm_asks_of_its_engine_core() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    from hycluster.gateway.pool import PoolClient

    asked = calls_on(AsyncLLM, "engine_core")
    # Elastic EP, weight transfer, checksums and fault tolerance act on one engine; a pool refuses them.
    of_one_engine = {
        "prepare_elastic_ep",
        "commit_elastic_ep",
        "collective_rpc_async",
        "compute_weight_checksums_async",
        "set_weight_version_async",
        "get_weight_version_async",
        "release_kv_cache_memory_async",
        "handle_fault",
        "get_status",
    }
    set_in_init = {"resources", "engine_ranks_managed"}
    assert asked - set(dir(PoolClient)) - set_in_init == of_one_engine


def test_engine_core_leaves_its_sockets_to_three_methods() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    assert "addresses" in set_on_self(EngineCoreProc.__init__)
    for method in ("_perform_handshakes", "process_input_sockets", "process_output_sockets"):
        assert calls_on(EngineCoreProc.__init__, "self") & {method}
    assert list(inspect.signature(EngineCoreProc.process_input_sockets).parameters)[-1] == "ready_event"
    assert {"input_queue", "output_queue"} <= set_on_self(EngineCoreProc.__init__)


def test_requests_and_outputs_travel_without_pickle() -> None:
    from vllm import envs

    assert envs.VLLM_ALLOW_INSECURE_SERIALIZATION is False


def test_routing_learns_of_padding_and_is_called_by_name() -> None:
    """``hycluster/models/routing.py``: the mask in the step's context, and how vLLM calls a routing function."""
    import torch
    from vllm.forward_context import ForwardContext
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from hycluster.models.routing import ExpertRouter
    from hycluster.settings.model import Routing

    assert "is_padding" in ForwardContext.__dataclass_fields__
    for method in (GPUModelRunner.execute_model, GPUModelRunner._dummy_run):
        assert "is_padding=is_padding" in inspect.getsource(method)
    runner: Any = type("Runner", (), {"is_padding": torch.zeros(8, dtype=torch.bool)})()
    mask = GPUModelRunner._prepare_padding_mask(runner, 3, 5)
    assert mask.tolist() == [False] * 3 + [True] * 2
    assert mask.data_ptr() == runner.is_padding.data_ptr()

    assert "custom_routing_function" in inspect.signature(FusedMoEFactory).parameters
    logits = torch.randn(5, 4)
    function = ExpertRouter(4, 2, 0, Routing(expert_metrics=True))
    for router in (
        CPURouter(top_k=2, global_num_experts=4, custom_routing_function=function),
        CustomRoutingRouter(top_k=2, global_num_experts=4, custom_routing_function=function),
    ):
        weights, ids = router._compute_routing(torch.randn(5, 8), logits, torch.int32)
        assert weights.shape == ids.shape == (5, 2)
    assert sum(function.counts().tokens) == 2 * 5 * 2  # type: ignore[union-attr]


class TestMigratedRequests:
    """``hycluster/engine/migrated.py``."""

    def test_a_request_takes_tokens_that_it_did_not_make(self) -> None:
        from vllm.v1.core.sched.output import NewRequestData
        from vllm.v1.request import Request

        assert {"append_output_token_ids", "num_output_tokens"} <= set(dir(Request))
        assert "prefill_stats" in set_on_self(Request.__init__)
        # Of prompt and output, for the model runner of version 2.
        assert "prefill_token_ids" in {field.name for field in dataclasses.fields(NewRequestData)}

    def test_statistics_of_a_prefill_may_be_missing(self) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler

        assert "prefill_stats is not None" in inspect.getsource(Scheduler)

    def test_the_second_one_draws_by_place(self) -> None:
        import importlib.util

        # A file of kernels that can't be imported without a GPU's Triton.
        found = importlib.util.find_spec("vllm.v1.worker.gpu.sample")
        assert found is not None
        assert found.submodule_search_locations
        source = (Path(found.submodule_search_locations[0]) / "gumbel.py").read_text()
        assert "def murmur3_uniform32(seed, pos, offset)" in source


def test_adapters_are_told_apart_by_name_and_path() -> None:
    """``hycluster/adapters.py``: an adapter that goes over to another source does not find the old one's KV blocks."""
    from types import SimpleNamespace

    from vllm.lora.request import LoRARequest
    from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys

    def keys(name: str, path: str) -> list[Any]:
        request: Any = SimpleNamespace(lora_request=LoRARequest(name, 1, path))
        return _gen_lora_extra_hash_keys(request)

    assert len({str(keys(name, path)) for name in "ab" for path in ("/a", "/b")}) == 4


def test_ranks_are_those_that_vllm_takes() -> None:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    from hycluster.adapters import RANKS

    assert get_args(MaxLoRARanks) == RANKS


def test_vllms_app_looks_adapters_up_where_the_ingress_process_puts_them() -> None:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    assert "lora_requests" in set_on_self(OpenAIServingModels.__init__)


def test_ranks_ask_for_a_wave_and_are_told_of_one() -> None:
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequestType
    from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc

    assert "start_wave" in EngineCoreOutputs.__struct_fields__
    assert EngineCoreRequestType.START_DP_WAVE
    adding = inspect.getsource(DPEngineCoreProc.add_request)
    assert "request_wave > self.current_wave" in adding
    assert "(-1, EngineCoreOutputs(start_wave=self.current_wave))" in adding
    assert "new_wave, exclude_eng_index = request" in inspect.getsource(DPEngineCoreProc._handle_client_request)
    started = inspect.getsource(EngineCoreProc.__init__)
    assert "self.has_coordinator = addresses.coordinator_output is not None" in started


def test_ranks_agree_on_ports_over_a_store() -> None:
    from vllm.config import ParallelConfig
    from vllm.distributed.parallel_state import init_distributed_environment

    for place in (ParallelConfig._pick_stateless_dp_port, init_distributed_environment):
        assert "_coord_store_port" in inspect.getsource(place)


def test_temporary_files_lie_where_they_are_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    from vllm import envs
    from vllm.utils.network_utils import get_file_store_init_method, get_open_zmq_ipc_path
    from vllm.v1.executor import multiproc_executor, uniproc_executor

    # The engine of another test may have filled it.
    envs.disable_envs_cache()
    monkeypatch.setattr(tempfile, "tempdir", "/engine-1")
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/engine-1")
    assert get_file_store_init_method().startswith("file:///engine-1/")
    assert len(get_open_zmq_ipc_path().removeprefix("ipc:///engine-1/")) == 36
    for executor in (multiproc_executor, uniproc_executor):
        assert "get_file_store_init_method" in inspect.getsource(executor)


def test_the_plugins_registries_are_where_vllm_looks() -> None:
    """``hycluster/models/plugin.py`` puts Hunyuan into them; vLLM's own entry point calls it."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.plugins import load_plugins_by_group
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from hycluster.models.configuration import HunyuanConfig
    from hycluster.models.plugin import ARCHITECTURES, register
    from hycluster.models.tokenizer import HunyuanTokenizer
    from hycluster.models.verify import TOKENIZER_MODE

    assert load_plugins_by_group("vllm.general_plugins")["hycluster"] is register
    register()
    assert _CONFIG_REGISTRY[HunyuanConfig.model_type] is HunyuanConfig
    assert all(issubclass(MODELS_CONFIG_MAP[name], VerifyAndUpdateConfig) for name in ARCHITECTURES)
    assert TokenizerRegistry.load_tokenizer_cls(TOKENIZER_MODE).__name__ == HunyuanTokenizer.__name__
    assert RENDERER_REGISTRY.load_renderer_cls(TOKENIZER_MODE) is RENDERER_REGISTRY.load_renderer_cls("hf")


def test_what_tells_whether_an_engine_has_work() -> None:
    """Read from outside of the engine's thread; a paused engine's requests are no work, or it would count as hung."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    assert "self.has_unfinished_requests()" in inspect.getsource(Scheduler.has_requests)
    assert "PAUSED_ALL:\n            return 0" in inspect.getsource(Scheduler.get_num_unfinished_requests)
    assert "self.input_queue.get" in inspect.getsource(EngineCoreProc._process_input_queue)
    assert "self.is_scheduler_paused() or self.model_executor.is_sleeping" in inspect.getsource(EngineCore.is_sleeping)


def test_what_a_step_may_have_unless_the_settings_say() -> None:
    """As docs/decisions.md has it: not what vLLM's API server takes, which goes by the device."""
    from vllm.config.scheduler import SchedulerConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    assert not any(UsageContext.ENGINE_CONTEXT in defaults for defaults in EngineArgs.get_batch_defaults(1))
    defaults = SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS, SchedulerConfig.DEFAULT_MAX_NUM_SEQS
    assert defaults == (2048, 128)
    source = inspect.getsource(EngineArgs.get_batch_defaults)
    assert source.index("160 * GiB_bytes") < source.index("16384") < source.index("70 * GiB_bytes")
    assert "UsageContext.OPENAI_API_SERVER: 8192" in source


def test_vllms_app_is_made_as_the_ingress_process_makes_it() -> None:
    """``hycluster/ingress/http.py``: of what, with which arguments, and what it has then."""
    from vllm.entrypoints.generate.api_router import init_generate_state
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert list(inspect.signature(build_app).parameters) == ["args", "supported_tasks", "model_config"]
    assert list(inspect.signature(init_app_state).parameters) == ["engine_client", "state", "args", "supported_tasks"]
    arguments = vars(make_arg_parser(FlexibleArgumentParser()).parse_args([]))
    assert {"model", "served_model_name", "allowed_origins", "structured_outputs_config"} <= arguments.keys()
    assert "enable_prompt_tokens_details" in arguments
    assert "state.openai_serving_completion = " in inspect.getsource(init_generate_state)
    assert "state.openai_serving_models = " in inspect.getsource(init_app_state)


def test_metrics_of_several_models_are_told_apart() -> None:
    """``hycluster/engine/vllm_metrics.py``: vLLM still throws out those of the one before, and where it finds them."""
    from vllm.v1.engine import async_llm
    from vllm.v1.metrics import loggers, prometheus

    from hycluster.observe.vllm_requests import ModelStats

    # What stands in the place of its loggers has all that is called of them.
    source = inspect.getsource(async_llm)
    called = set(re.findall(r"(?:logger_manager|logger_ref\[0\])\.(\w+)\(", source))
    assert "record" in called
    assert called <= set(dir(ModelStats))
    for name in called:
        wanted = inspect.signature(getattr(loggers.StatLoggerManager, name)).parameters
        assert wanted.keys() == inspect.signature(getattr(ModelStats, name)).parameters.keys()
    assert "unregister_vllm_metrics()" in inspect.getsource(loggers.PrometheusStatLogger.__init__)
    thrown_out = inspect.getsource(prometheus.unregister_vllm_metrics)
    assert "registry._collector_to_names" in thrown_out
    assert '_name.startswith("vllm:")' in thrown_out


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an ingress process has it; without, each output of a step looks for ``VLLM_COMPUTE_NANS_IN_LOGITS``."""
    from vllm import envs

    envs.disable_envs_cache()
    name = "VLLM_COMPUTE_NANS_IN_LOGITS"
    assert not getattr(envs, name)
    monkeypatch.setenv(name, "1")
    assert getattr(envs, name)
    envs.enable_envs_cache()
    try:
        monkeypatch.delenv(name)
        assert getattr(envs, name)
    finally:
        envs.disable_envs_cache()
