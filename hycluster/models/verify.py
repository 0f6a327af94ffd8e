"""What is settled about a Hunyuan model before vLLM builds anything: what can't be right is refused here.

vLLM calls these hooks while it makes its configuration, in the process that the user started, so that a wrong
setting is one line there and not a traceback from a worker.
"""

from __future__ import annotations

from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from hycluster.models.configuration import layer_shape, rope_of, share_factor

TOKENIZER_MODE = "hunyuan"


class HunyuanVerification(VerifyAndUpdateConfig):
    """vLLM's hooks for an architecture's configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = TOKENIZER_MODE

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse a configuration, or a cut over ranks, that can't be right.

        Raises:
            ValueError: names the field, the value and what is allowed.
        """
        config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
        rope_of(config)
        shapes = [layer_shape(config, layer) for layer in range(config.num_hidden_layers)]
        experts = {shape.experts for shape in shapes if shape.is_moe}
        if parallel.enable_eplb and len(experts) != 1:
            raise ValueError(f"enable_eplb: needs the same num_experts in all layers; this model has {sorted(experts)}")
        check_pipeline_cut(config, parallel.pipeline_parallel_size)


def check_pipeline_cut(config: Any, stages: int) -> None:
    """Refuse a pipeline stage that begins inside a group of layers that share keys and values.

    Raises:
        ValueError: names the layer, and a partition that works.
    """
    share = share_factor(config)
    for stage in range(stages):
        start, _ = get_pp_indices(config.num_hidden_layers, stage, stages)
        if start % share:
            raise ValueError(
                f"pipeline_parallel_size: {stages} cuts the {config.num_hidden_layers} layers at layer {start}, between"
                f" layers that share keys and values (cla_share_factor {share}); set VLLM_PP_LAYER_PARTITION="
                f"{','.join(map(str, aligned_partition(config, stages)))} or the like, in multiples of {share}"
            )


def aligned_partition(config: Any, stages: int) -> list[int]:
    """Layers a pipeline stage, as even as can be without cutting a group that shares keys and values."""
    share, layers = share_factor(config), int(config.num_hidden_layers)
    groups = -(-layers // share)
    counts = [(groups // stages + (stage < groups % stages)) * share for stage in range(stages)]
    counts[-1] -= groups * share - layers
    return counts
