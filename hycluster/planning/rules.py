"""What vLLM can't cut a model into, each with its reason.

Rules of vLLM 0.32.0: ``vllm/config/model.py`` (heads), ``vllm/model_executor/layers/linear.py`` (widths),
``vllm/model_executor/layers/quantization/utils/fp8_utils.py`` (blocks), ``vllm/distributed/eplb`` (copies of experts);
and of ``hycluster/models/verify.py`` (pipelines through layers that share keys and values).
"""

from __future__ import annotations

from hycluster.planning.architecture import Architecture
from hycluster.planning.precision import Precision
from hycluster.planning.shares import kv_copies, stages
from hycluster.settings.parallel import Parallel


def refusals(model: Architecture, parallel: Parallel, precision: Precision) -> list[str]:
    """Why vLLM would not start this; empty where it would."""
    return [
        *_heads(model, parallel.tensor),
        *_widths(model, parallel, precision),
        *_experts(model, parallel),
        *_pipeline(model, parallel.pipeline),
    ]


def _heads(model: Architecture, tensor: int) -> list[str]:
    if model.heads % tensor:
        return [f"tensor {tensor}: {model.heads} query heads are not divisible by {tensor}"]
    if model.latent is None and model.kv_heads % tensor and tensor % model.kv_heads:
        return [
            f"tensor {tensor}: {model.kv_heads} KV heads can neither be divided among {tensor} ranks nor copied evenly"
        ]
    return []


def _widths(model: Architecture, parallel: Parallel, precision: Precision) -> list[str]:
    tensor, found = parallel.tensor, []
    dense = {layer.shared_ffn if layer.experts else layer.ffn for layer in model.layers} - {0}
    cut = [("FFN" if not model.experts else "dense or shared FFN", width, tensor, "tensor") for width in sorted(dense)]
    if not parallel.expert:
        routed = sorted({layer.ffn for layer in model.layers if layer.experts})
        how = "tensor" if parallel.data == 1 else "tensor x data"
        cut += [("expert FFN", width, parallel.expert_ranks, how) for width in routed]
    if model.latent is None:
        cut.append(("query projection", model.heads * model.head_size, tensor, "tensor"))
    for name, width, ranks, how in cut:
        if width % ranks:
            found.append(f"{how} {ranks}: {name} of width {width} is not divisible by {ranks}")
        elif precision.block is not None and ranks > 1 and width // ranks % max(precision.block):
            found.append(
                f"{how} {ranks}: {name} of width {width} leaves {width // ranks} channels a rank, no multiple of the"
                f" {max(precision.block)} that share a scale in this FP8 checkpoint"
            )
    return found


def _experts(model: Architecture, parallel: Parallel) -> list[str]:
    ranks, copies = parallel.expert_ranks, parallel.eplb.redundant_experts
    if not model.experts:
        if parallel.expert:
            return ["expert: this model has no routed experts"]
        if parallel.data > 1:
            return [f"data {parallel.data}: without routed experts such ranks share nothing; use replicas"]
        return []
    if not parallel.expert:
        return []
    held = min(layer.experts for layer in model.layers if layer.experts) + copies
    if ranks > held:
        with_copies = f" with {copies} copies" if copies else ""
        return [
            (
                f"expert over {ranks} ranks: {held} experts{with_copies} leave {ranks - held} of them without any;"
                f" needs parallel.eplb.redundant_experts of at least {ranks - held + copies}"
            )
        ]
    if parallel.eplb.enabled and held % ranks:
        return [
            f"expert over {ranks} ranks: {held} experts with their copies are not divisible by {ranks}, as EPLB needs"
        ]
    return []


def _pipeline(model: Architecture, count: int) -> list[str]:
    if count > len(model.layers):
        return [f"pipeline {count}: there are {len(model.layers)} layers"]
    for stage in stages(model, count):
        if not stage[0].caches_kv:
            return [f"pipeline {count}: a stage would begin between layers that share keys and values"]
    return []


def remarks(model: Architecture, parallel: Parallel) -> list[str]:
    """What is worth knowing of a layout that works."""
    found, tensor = [], parallel.tensor
    copies = kv_copies(model, tensor)
    if model.latent is not None and tensor > 1:
        found.append(
            f"each of the {tensor} tensor ranks holds the whole latent KV cache; with data ranks in their place each"
            " has sequences of its own"
        )
    elif copies > 1:
        found.append(
            f"{tensor} tensor ranks share {model.kv_heads} KV heads: each, with its cache, is there {copies:g} times"
        )
    if parallel.expert and model.experts and (model.experts + parallel.eplb.redundant_experts) % parallel.expert_ranks:
        found.append(
            f"{model.experts} experts over {parallel.expert_ranks} ranks: the fullest ranks hold"
            f" {-(-model.experts // parallel.expert_ranks)}, the others one less"
        )
    windowed = sum(layer.window is not None for layer in model.layers)
    if windowed:
        widest = max(layer.window or 0 for layer in model.layers)
        found.append(
            f"{windowed} of {len(model.layers)} layers keep only the last {widest} tokens of a sequence in the KV cache"
        )
    return found
