"""What a replica of the settings is in virtual time: how long its steps take, and what may be in them.

Where its step times come from, the first that there is: a fit, ``models[].simulated``, the roofline of a GPU.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hycluster.engine.routed_weights import RoutedWeights
from hycluster.errors import SettingsError
from hycluster.gateway.prefix_router import StepCost
from hycluster.planning.architecture import GIB
from hycluster.planning.families import architecture, read_config
from hycluster.planning.gpus import gpu as gpu_named
from hycluster.planning.precision import precision_of
from hycluster.planning.shares import UTILIZATION, device_share, kv_bytes_per_token
from hycluster.planning.speed import experts_held
from hycluster.settings.model import Colocation, Model
from hycluster.settings.simulated import Simulated
from hycluster.simulate.counted_engine import CountedSizes
from hycluster.simulate.step_work import LinearStep, Roofline, StepSeconds, step_cost

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Arguments of vLLM's engine that its scheduler or its KV cache manager look at.
SCHEDULING = (
    "block_size", "enable_chunked_prefill", "enable_prefix_caching", "long_prefill_token_threshold",
    "max_long_partial_prefills", "max_model_len", "max_num_batched_tokens", "max_num_partial_prefills", "max_num_seqs",
    "prefix_caching_hash_algo", "scheduler_cls", "scheduler_reserve_full_isl", "scheduling_policy", "watermark",
)  # fmt: skip
BLOCK_TOKENS = 16
# Of a step, for a router that estimates, where the settings leave it to vLLM.
USUAL_STEP_TOKENS = 2048
# vLLM takes the settings' scheduling from a model's configuration; this one has no more than it takes to have one.
_STAND_IN = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "vocab_size": 256,
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OnGpu:
    """A GPU in place of what the settings say.

    Attributes:
        gpu: its name; None is the settings' ``hardware.accelerator``.
        model_config: a ``config.json`` or its folder; None is the settings' ``source``.
        weights: data type of the weights; None as the checkpoint's configuration says.
        efficiency: share of the GPU's peak that kernels reach.
    """

    gpu: str | None = None
    model_config: Path | None = None
    weights: str | None = None
    efficiency: float = 0.7


@dataclass(frozen=True, slots=True)
class Machine:
    """One engine.

    Attributes:
        scheduling: arguments of vLLM's engine.
        asynchronous: a step is scheduled while the one before is computed.
        gpus: that it takes; 0 on CPU.
        source: where its step times come from, in words.
        experts: of a model that has some; what an engine's scheduler knows of it by the weights that are loaded.
    """

    step_time: StepSeconds
    scheduling: Mapping[str, Any]
    kv_blocks: int
    asynchronous: bool
    gpus: int
    source: str
    experts: RoutedWeights | None = None

    @property
    def block_tokens(self) -> int:
        return int(self.scheduling["block_size"])

    @property
    def kv_tokens(self) -> int:
        # One block is the null block.
        return (self.kv_blocks - 1) * self.block_tokens

    @property
    def max_model_len(self) -> int:
        return int(self.scheduling["max_model_len"])

    @property
    def sizes(self) -> CountedSizes:
        """What bounds a step; vLLM is asked where the settings do not say it."""
        said = self.scheduling
        if not {"max_num_batched_tokens", "max_num_seqs"} <= said.keys():
            scheduler = self.config(Colocation(enabled=False)).scheduler_config
            said = {"max_num_batched_tokens": scheduler.max_num_batched_tokens, "max_num_seqs": scheduler.max_num_seqs}
        return CountedSizes(
            step_tokens=int(said["max_num_batched_tokens"]),
            step_rows=int(said["max_num_seqs"]),
            kv_tokens=self.kv_tokens,
            block_tokens=self.block_tokens,
            asynchronous=self.asynchronous,
            prefix_caching=bool(self.scheduling.get("enable_prefix_caching", True)),
        )

    @property
    def step_cost(self) -> StepCost:
        """What a router is told of its steps."""
        return step_cost(self.step_time, int(self.scheduling.get("max_num_batched_tokens", USUAL_STEP_TOKENS)))

    def config(self, colocation: Colocation) -> VllmConfig:
        """vLLM's configuration for a scheduler."""
        from hycluster.engine.scheduler import use_colocation

        # Making one takes a second.
        config = copy.deepcopy(_config(json.dumps(dict(self.scheduling))))
        config.scheduler_config.async_scheduling = self.asynchronous
        use_colocation(config, colocation)
        return config


@functools.lru_cache(maxsize=8)
def _config(scheduling: str) -> VllmConfig:
    """With as much of a model as it takes to have one."""
    from hycluster.engine.vllm import engine_config

    arguments = json.loads(scheduling)
    with tempfile.TemporaryDirectory() as folder:
        said = {**_STAND_IN, "max_position_embeddings": arguments["max_model_len"]}
        (Path(folder) / "config.json").write_text(json.dumps(said))
        arguments |= {"skip_tokenizer_init": True, "load_format": "dummy"}
        model = Model(name="virtual", source=folder, engine=arguments, colocation=Colocation(enabled=False))
        return engine_config(model, folder)


def machine_of(model: Model, on: OnGpu) -> Machine:
    """The engine of these settings.

    Raises:
        SettingsError: nothing says how long its steps take, or it is cut in a way that is not simulated.
    """
    for name, ranks in (("data", model.parallel.data), ("pipeline", model.parallel.pipeline)):
        if ranks > 1:
            raise SettingsError(
                f"models: {model.name}: parallel.{name}: {ranks} can't be simulated; must be 1 (ranks that step"
                " together are not in this model of time)"
            )
    if model.simulated is not None and on.gpu is None:
        return simulated_machine(model, model.simulated, "models[].simulated")
    if on.gpu is None and model.hardware.accelerator is None:
        raise SettingsError(
            f"models: {model.name}: nothing says how long a step takes; give its settings 'simulated', or --fit to"
            " measure, or --gpu to calculate"
        )
    return _gpu_machine(model, on)


def simulated_machine(model: Model, simulated: Simulated, source: str) -> Machine:
    """An engine with these coefficients."""
    return Machine(
        step_time=LinearStep(
            simulated.step_base_s, simulated.prefill_token_s, simulated.decode_token_s, simulated.kv_token_s
        ),
        scheduling={
            **_scheduling(model),
            "max_num_seqs": simulated.max_num_seqs,
            "max_num_batched_tokens": simulated.max_num_batched_tokens,
            "max_model_len": simulated.max_model_len,
            "block_size": simulated.block_size_tokens,
        },
        # One more: vLLM's null block holds nothing.
        kv_blocks=simulated.kv_blocks + 1,
        asynchronous=_asynchronous(model),
        gpus=model.parallel.devices if model.hardware.accelerator is not None else 0,
        source=source,
    )


def sizes_in(config: VllmConfig) -> dict[str, int]:
    """An engine's, by the names that ``models[].simulated`` has for them."""
    cache = config.cache_config
    return {
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "kv_blocks": (cache.num_gpu_blocks or 1) - 1,
        "block_size_tokens": cache.block_size,
        "max_model_len": config.model_config.max_model_len,
    }


def sizes_of(model: Model) -> dict[str, int]:
    """The same of an engine that is not here: what the settings give it, without what vLLM finds at its start."""
    from hycluster.engine.arguments import model_files
    from hycluster.engine.vllm import engine_config

    path = model_files(model)
    config = engine_config(model, path)
    if model.hardware.accelerator is not None:
        gpu = _gpu_machine(model, OnGpu(model_config=Path(path)))
        config.cache_config.num_gpu_blocks = gpu.kv_blocks
    else:
        token = kv_bytes_per_token(architecture(read_config(path)), "float32")
        room = int(model.hardware.kv_cache_gib * GIB) // token
        config.cache_config.num_gpu_blocks = room // config.cache_config.block_size
    return sizes_in(config)


def _gpu_machine(model: Model, on: OnGpu) -> Machine:
    gpu = gpu_named(on.gpu or str(model.hardware.accelerator))
    said = read_config(on.model_config or Path(model.source))
    shape = architecture(said)
    kv = model.engine.get("kv_cache_dtype", "auto")
    precision = precision_of(said, on.weights or model.engine.get("quantization"), "fp8" if "fp8" in kv else kv)
    share = device_share(shape, model.parallel, precision)
    scheduling = {"block_size": BLOCK_TOKENS, **_scheduling(model)}
    scheduling.setdefault("max_model_len", shape.positions)
    utilization = float(model.engine.get("gpu_memory_utilization", UTILIZATION))
    blocks = share.kv_tokens(gpu.memory_gib, utilization) // int(scheduling["block_size"])
    if blocks * int(scheduling["block_size"]) < scheduling["max_model_len"]:
        raise SettingsError(
            f"models: {model.name}: on {model.parallel.devices} {gpu.name} there is room for"
            f" {blocks * int(scheduling['block_size'])} tokens of KV cache beside {precision.weights} weights; must be"
            f" at least max_model_len ({scheduling['max_model_len']})"
        )
    return Machine(
        step_time=Roofline(shape, model.parallel, share, precision, gpu, on.efficiency),
        scheduling=scheduling,
        kv_blocks=int(model.engine.get("num_gpu_blocks_override", blocks)),
        asynchronous=_asynchronous(model, on_gpu=True),
        gpus=model.parallel.devices,
        source=f"roofline of {model.parallel.devices} {gpu.name}, {precision.weights} weights, at"
        f" {on.efficiency:.0%} of its peak",
        experts=RoutedWeights(
            shape.experts,
            shape.top_k,
            experts_held(shape, model.parallel),
            model.parallel.expert_ranks if model.parallel.expert else 1,
            share.routed / (share.routed + share.read),
        )
        if shape.experts
        else None,
    )


def _scheduling(model: Model) -> dict[str, Any]:
    return {name: value for name, value in model.engine.items() if name in SCHEDULING}


def _asynchronous(model: Model, on_gpu: bool = False) -> bool:
    return bool(model.engine.get("async_scheduling", on_gpu or model.hardware.accelerator is not None))
