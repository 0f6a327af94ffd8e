"""What one GPU of a replica holds: its share of the weights, and of each sequence's KV cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hycluster.planning.architecture import (
    GIB,
    Architecture,
    Layer,
    kv_channels,
    layer_parameters,
    mha_kv_channels,
)
from hycluster.planning.precision import Precision, size
from hycluster.settings.parallel import Parallel

# Of a GPU's memory: what vLLM may use, and what of that goes to activations, CUDA graphs and communication buffers.
# The second is an estimate; vLLM measures it at its start.
UTILIZATION = 0.9
RESERVE_GIB = 4.0


def kv_bytes_per_token(model: Architecture, dtype: str = "bfloat16") -> int:
    """Bytes of KV cache that one token takes in the whole model, before any window leaves it behind."""
    return round(size(kv_channels(model), dtype))


def mha_kv_bytes_per_token(model: Architecture, dtype: str = "bfloat16") -> int:
    """The same with a key and a value for each query head in each layer, for comparison."""
    return round(size(mha_kv_channels(model), dtype))


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What the fullest device of a replica holds. Bytes.

    Attributes:
        routed: of ``weights_bytes``, its routed experts.
        read: of ``weights_bytes``, what every step reads: all but the embedding's table and the routed experts.
        kv_bytes_per_token: of each token that this device's data parallel rank serves, until a window leaves it behind.
        windows: the part of that which windows bound: tokens, and bytes a token.
    """

    weights_bytes: int
    routed: int
    read: int
    kv_bytes_per_token: int
    windows: tuple[tuple[int, int], ...] = ()

    def kv_bytes(self, tokens: int) -> int:
        """Of one sequence of so many tokens that is decoding."""
        beyond = sum(each * max(0, tokens - window) for window, each in self.windows)
        return self.kv_bytes_per_token * tokens - beyond

    def free_bytes(self, memory_gib: float, utilization: float = UTILIZATION, reserve_gib: float = RESERVE_GIB) -> int:
        """Room for the KV cache; below 0 is what is missing.

        Args:
            memory_gib: the device's memory.
            utilization: the share that vLLM may use (``gpu_memory_utilization``).
            reserve_gib: activations, CUDA graphs and communication buffers.
        """
        return int((memory_gib * utilization - reserve_gib) * GIB) - self.weights_bytes

    def kv_tokens(self, memory_gib: float, utilization: float = UTILIZATION, reserve_gib: float = RESERVE_GIB) -> int:
        """Tokens that the KV cache of one data parallel rank holds, of sequences that are within their windows."""
        return max(0, self.free_bytes(memory_gib, utilization, reserve_gib) // self.kv_bytes_per_token)


def stages(model: Architecture, count: int) -> list[tuple[Layer, ...]]:
    """The layers of each pipeline stage.

    As even as can be; of what is left over each stage gets one layer, from the last but one on, as vLLM 0.32 does
    (``vllm/distributed/utils.py``).
    """
    each, over = divmod(len(model.layers), count)
    sizes = [each + (1 if count - 1 - over <= stage < count - 1 else 0) for stage in range(count)]
    starts = [sum(sizes[:stage]) for stage in range(count)]
    return [model.layers[start : start + length] for start, length in zip(starts, sizes, strict=True)]


def kv_copies(model: Architecture, tensor: int) -> float:
    """How often the KV cache of a token lies on a rank's tensor-parallel devices, all together."""
    return tensor if model.latent is not None else max(1, tensor / model.kv_heads)


def device_share(model: Architecture, parallel: Parallel, precision: Precision | None = None) -> DeviceShare:
    """How vLLM spreads a replica over its devices.

    Attention, shared experts, embedding and head are cut by ``tensor``; KV heads no further than into single heads, and
    a latent cache not at all. Routed experts, with their redundant copies, lie whole on ``tensor x data`` ranks with
    ``expert``, and are cut that often without. Router, norms and latent attention's compressing projections are on
    every device.
    """
    precision = precision or Precision()
    shares = [
        _stage_share(model, layers, parallel, precision, first=index == 0, last=index == parallel.pipeline - 1)
        for index, layers in enumerate(stages(model, parallel.pipeline))
    ]
    # A stage's weights and its KV cache compete for the same memory; with caches of a size it is the heaviest.
    fullest = max(shares, key=lambda share: share.weights_bytes)
    most_kv = max(shares, key=lambda share: share.kv_bytes_per_token)
    return DeviceShare(
        weights_bytes=fullest.weights_bytes,
        routed=fullest.routed,
        read=fullest.read,
        kv_bytes_per_token=most_kv.kv_bytes_per_token,
        windows=most_kv.windows,
    )


def _stage_share(
    model: Architecture, layers: tuple[Layer, ...], parallel: Parallel, precision: Precision, first: bool, last: bool
) -> DeviceShare:
    tensor, ranks = parallel.tensor, parallel.expert_ranks
    # More tensor ranks than KV heads: each rank has a whole one, and the projections that make it.
    doubled = 0 if model.latent is not None else max(0, tensor - model.kv_heads) * 2 * model.head_size * model.hidden
    quantized = kept = routed = absorbed = 0.0
    for layer, count in Counter(layers).items():
        counted = layer_parameters(model, layer)
        more_kv = doubled if layer.caches_kv else 0
        quantized += count * ((counted.attention + more_kv + counted.mlp) / tensor + counted.latent)
        kept += count * (counted.router + counted.norms)
        if layer.experts and parallel.expert:
            routed += count * -(-(layer.experts + parallel.eplb.redundant_experts) // ranks) * counted.expert
        elif layer.experts:
            routed += count * layer.experts * counted.expert / ranks
        if (latent := model.latent) is not None:
            # vLLM keeps the projection from the latent vector to keys and values once more, as two matrices to
            # decode with (W_UK, W_UV in vllm/model_executor/layers/attention/mla_attention.py, 0.32.0).
            absorbed += count * model.heads * latent.kv_rank * (latent.key_size + latent.value_size) / tensor
    dense = precision.kept if precision.experts_only else precision.weights
    routed_bytes = size(routed, precision.weights)
    end = size(model.embedding / tensor, precision.kept)
    read = size(quantized, dense) + size(kept, precision.kept) + (end if last else 0)
    # A tied head is the embedding itself, where both are on one device.
    table = end if first and not (last and model.tied) else 0
    held = read + table + routed_bytes + size(absorbed, precision.kept)
    kv_bytes = size(model.cached_channels * kv_copies(model, tensor) / tensor, precision.kv)
    windows: dict[int, float] = {}
    for layer in layers:
        if layer.caches_kv and layer.cached_window is not None:
            windows[layer.cached_window] = windows.get(layer.cached_window, 0) + kv_bytes
    return DeviceShare(
        weights_bytes=round(held),
        routed=round(routed_bytes),
        read=round(read),
        kv_bytes_per_token=max(1, round(kv_bytes * sum(layer.caches_kv for layer in layers))),
        windows=tuple((window, round(each)) for window, each in sorted(windows.items())),
    )
