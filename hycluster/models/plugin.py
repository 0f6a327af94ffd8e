"""The entry point of vLLM's ``vllm.general_plugins``: what hycluster adds to any vLLM of the pinned version.

vLLM calls :func:`register` in every process that it starts (API server, engine core, workers), so it is quick,
imports no model code, and may be called more than once. ``VLLM_PLUGINS`` chooses among plugins;
``--model-impl transformers`` asks for vLLM's generic implementation of A13B instead of ours.
"""

from __future__ import annotations

MODEL = "hycluster.models.hunyuan:HunyuanForCausalLM"
ARCHITECTURES = ("HunYuanForCausalLM", "HunYuanMoEV1ForCausalLM")


def register() -> None:
    """Make Hunyuan's configuration and model known to vLLM."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from hycluster.models.configuration import HunyuanConfig

    # In vLLM's own registry a configuration counts as local: a checkpoint's ``auto_map`` is not followed,
    # and no remote code runs, even where the caller trusts it.
    _CONFIG_REGISTRY[HunyuanConfig.model_type] = HunyuanConfig
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, MODEL)
