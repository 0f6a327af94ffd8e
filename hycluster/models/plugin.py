"""The entry point of vLLM's ``vllm.general_plugins``: what hycluster adds to any vLLM of the pinned version.

vLLM calls :func:`register` in every process that it starts (API server, engine core, workers), so it
imports no model code, and may be called more than once. ``VLLM_PLUGINS`` chooses among plugins;
``--model-impl transformers`` asks for vLLM's generic implementation of A13B instead of ours.
"""

from __future__ import annotations

MODEL = "hycluster.models.hunyuan:HunyuanForCausalLM"
TOKENIZER = ("hycluster.models.tokenizer", "HunyuanTokenizer")
ARCHITECTURES = ("HunYuanForCausalLM", "HunYuanMoEV1ForCausalLM")


def _patch_communicator() -> None:
    from hycluster.engine.patches.cpu_gatherv import patch_collectives
    from hycluster.engine.patches.cpu_memory import patch_segments

    patch_segments()
    patch_collectives()


def _patch_experts() -> None:
    from hycluster.engine.patches.cpu_experts import patch_experts

    patch_experts()


def _patch_lora() -> None:
    from hycluster.engine.patches.cpu_lora import patch_lora

    patch_lora()


def _patch_kernel_search() -> None:
    from hycluster.engine.patches.cpu_kernels import patch_kernel_search

    patch_kernel_search()


def _patch_adapter_identity() -> None:
    from hycluster.engine.patches.adapter_identity import patch_adapter_identity

    patch_adapter_identity()


def _patch_lora_experts() -> None:
    from hycluster.engine.patches.cpu_lora_experts import patch_lora_experts

    patch_lora_experts()


# By what of vLLM's they change, or what comes before it: only processes that run the model import that, and it takes
# them seconds, which ingress processes and batch workers should not pay for.
CPU_PATCHES = {
    "vllm.distributed.device_communicators.cpu_communicator": _patch_communicator,
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe": _patch_experts,
    "vllm.lora.punica_wrapper.punica_selector": _patch_lora,
    "vllm.lora.model_manager": _patch_lora_experts,
    "vllm.triton_utils.dispatcher": _patch_kernel_search,
}


def register() -> None:
    """Make Hunyuan's configuration and model known to vLLM, and patch what it lacks.

    Raises:
        WrongVersion: another version of vLLM is installed than the patches are for.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.platforms import current_platform
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from hycluster import logs
    from hycluster.engine.patches.progress_bar import patch_progress_bars
    from hycluster.engine.patches.queue_memory import patch_queues
    from hycluster.imports import when_imported
    from hycluster.models.configuration import HunyuanConfig
    from hycluster.models.verify import TOKENIZER_MODE, HunyuanVerification

    logs.settle_below()
    # In vLLM's own registry a configuration counts as local: a checkpoint's ``auto_map`` is not followed,
    # and no remote code runs, even where the caller trusts it.
    _CONFIG_REGISTRY[HunyuanConfig.model_type] = HunyuanConfig
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, MODEL)
        MODELS_CONFIG_MAP[architecture] = HunyuanVerification
    TokenizerRegistry.tokenizers[TOKENIZER_MODE] = TOKENIZER
    RENDERER_REGISTRY.renderers[TOKENIZER_MODE] = ("vllm.renderers.hf", "HfRenderer")
    patch_queues()
    patch_progress_bars()
    when_imported("vllm.lora.worker_manager", _patch_adapter_identity)
    if current_platform.is_cpu():
        for module, patch in CPU_PATCHES.items():
            when_imported(module, patch)
