"""What an engine's workers hold of routed experts, by the weights that they have loaded.

Reaches into vLLM 0.32.0 for its layer that owns them, ``RoutedExperts``. So it holds for any family, data type and
quantization, also for those that nobody here has heard of.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from hycluster.engine.routed_weights import RoutedWeights


def worker_weights(worker: Any) -> RoutedWeights | None:
    """Of one worker; None for a dense model. In a form that vLLM's ``collective_rpc`` can call on each."""
    model = worker.get_model()
    layers = [layer for layer in model.modules() if isinstance(layer, RoutedExperts)]
    held = sum(_bytes(layer) for layer in layers)
    if not held:
        return None
    most = max(layers, key=lambda layer: layer.moe_config.num_logical_experts)
    return RoutedWeights(
        experts=most.moe_config.num_logical_experts,
        top_k=most.top_k,
        held=most.local_num_experts,
        ranks=most.moe_config.ep_size,
        share=held / _bytes(model),
    )


def routed_weights(workers: list[RoutedWeights | None]) -> RoutedWeights | None:
    """Of an engine: of its pipeline stages, the one with most of them."""
    return max((each for each in workers if each is not None), key=lambda each: each.share, default=None)


def _bytes(module: Any) -> int:
    return sum(each.numel() * each.element_size() for each in (*module.parameters(), *module.buffers()))
