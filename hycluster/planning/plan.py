"""All that ``hycluster plan`` says, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hycluster.planning.architecture import Architecture, Parameters, kv_channels, parameters
from hycluster.planning.families import architecture
from hycluster.planning.gpus import Gpu
from hycluster.planning.layouts import Fit, Misfit, Pinned, Search, Workload, search
from hycluster.planning.offload import KvOffload, WeightOffload, kv_offload, weight_offload
from hycluster.planning.precision import BITS, Precision, size
from hycluster.planning.rules import remarks
from hycluster.planning.shares import kv_bytes_per_token, mha_kv_bytes_per_token
from hycluster.planning.speed import Decode, decode_bound, prefill_s

SHOWN_DTYPES = ("bfloat16", "fp8", "int4")


@dataclass(frozen=True, slots=True)
class Plan:
    """What it takes to serve a model.

    Attributes:
        weights_bytes: of the whole model, by data type of its projections.
        chosen: the layout that takes fewest GPUs.
        full: the bound on decoding with as many sequences as a replica of the chosen layout holds.
        prefill_s: the least time to the first token of a prompt as long as the context, alone.
    """

    model: Architecture
    counted: Parameters
    precision: Precision
    gpu: Gpu
    demand: Workload
    weights_bytes: dict[str, int]
    kv_bytes_per_token: int
    kv_bytes_of_context: int
    mha_kv_bytes_per_token: int
    found: Search
    full: Decode
    prefill_s: float
    remarks: tuple[str, ...]
    kv_offload: KvOffload
    weight_offload: WeightOffload | None

    @property
    def chosen(self) -> Fit:
        return self.found.fits[0]

    @property
    def alternatives(self) -> tuple[Fit, ...]:
        """Other layouts with at most twice as many GPUs, best first, each cut once."""
        others: dict[tuple[int, int, int], Fit] = {}
        for fit in self.found.fits:
            if fit.gpus <= 2 * self.chosen.gpus:
                cut = fit.parallel.tensor, fit.parallel.pipeline, fit.parallel.data
                others.setdefault(cut, fit)
        return tuple(others.values())[1:]

    @property
    def too_large(self) -> tuple[Misfit, ...]:
        """Of each smaller number of GPUs, the layout that misses least."""
        return self.found.misfits


def total_weights_bytes(counted: Parameters, precision: Precision) -> int:
    """Bytes of a checkpoint: quantization leaves embedding, head, router and norms alone."""
    projections = counted.attention + counted.mlp
    kept = counted.total - counted.experts - projections
    dense = precision.kept if precision.experts_only else precision.weights
    return round(size(counted.experts, precision.weights) + size(projections, dense) + size(kept, precision.kept))


def make_plan(
    config: Mapping[str, Any], precision: Precision, gpu: Gpu, demand: Workload, pinned: Pinned | None = None
) -> Plan:
    """Work everything out.

    Raises:
        SettingsError: the model is not known, or no layout works.
    """
    model = architecture(config)
    counted = parameters(model)
    found = search(model, precision, gpu, demand, pinned)
    chosen = found.fits[0]
    return Plan(
        model=model,
        counted=counted,
        precision=precision,
        gpu=gpu,
        demand=demand,
        weights_bytes={dtype: total_weights_bytes(counted, Precision(dtype, precision.kept)) for dtype in SHOWN_DTYPES}
        | {precision.weights: total_weights_bytes(counted, precision)},
        kv_bytes_per_token=kv_bytes_per_token(model, precision.kv),
        kv_bytes_of_context=round(size(kv_channels(model, demand.context_tokens), precision.kv)),
        mha_kv_bytes_per_token=mha_kv_bytes_per_token(model, precision.kv),
        found=found,
        full=decode_bound(
            model, chosen.parallel, chosen.share, precision, gpu, chosen.sequences, demand.context_tokens
        ),
        prefill_s=prefill_s(model, chosen.parallel, precision, gpu, demand.context_tokens),
        remarks=(*_precision_remarks(precision, gpu), *remarks(model, chosen.parallel)),
        kv_offload=kv_offload(model, chosen, precision, gpu, demand.context_tokens),
        weight_offload=weight_offload(model, found.misfits[-1], precision, gpu, demand) if found.misfits else None,
    )


def _precision_remarks(precision: Precision, gpu: Gpu) -> list[str]:
    found = []
    if not precision.stored:
        found.append(
            f"this checkpoint does not hold {precision.weights}; take one that does, or see engine.quantization of vLLM"
        )
    if BITS[precision.weights] <= 8 and gpu.tflops(precision.weights) == gpu.tflops_16:
        found.append(
            f"{gpu.name} is counted with 16-bit arithmetic for {precision.weights} weights, which its kernels widen"
        )
    return found


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; keys carry their unit. A stable form for scripts."""
    model, counted = plan.model, plan.counted
    return {
        "model": {
            "model_type": model.kind,
            "layers": len(model.layers),
            "experts": model.experts,
            "experts_per_token": model.top_k,
            "parameters": counted.total,
            "active_parameters": counted.active,
            "max_context_tokens": model.positions,
            "weights_bytes": plan.weights_bytes,
            "kv_bytes_per_token": plan.kv_bytes_per_token,
            "kv_bytes_per_sequence": plan.kv_bytes_of_context,
            "mha_kv_bytes_per_token": plan.mha_kv_bytes_per_token,
        },
        "precision": asdict(plan.precision),
        "gpu": asdict(plan.gpu),
        "demand": asdict(plan.demand),
        "layout": _fit_json(plan, plan.chosen),
        "alternatives": [_fit_json(plan, fit) for fit in plan.alternatives],
        "too_large": [
            {
                "parallel": _parallel_json(misfit),
                "gpus": misfit.parallel.devices,
                "weights_bytes_per_gpu": misfit.share.weights_bytes,
                "missing_bytes_per_gpu": misfit.missing_bytes,
            }
            for misfit in plan.too_large
        ],
        "refused": list(plan.found.refused),
        "remarks": list(plan.remarks),
        "bounds": {
            "decode_asked": _decode_json(plan.chosen.decode),
            "decode_full": _decode_json(plan.full),
            "prefill_s": plan.prefill_s,
        },
        "kv_offload": asdict(plan.kv_offload),
        "weight_offload": plan.weight_offload
        and {
            "parallel": _parallel_json(plan.weight_offload),
            "gpus": plan.weight_offload.parallel.devices,
            "cpu_offload_gb_per_gpu": plan.weight_offload.offload_gib,
            "tokens_per_s_each": plan.weight_offload.tokens_per_s_each,
        },
    }


def _parallel_json(of: Fit | Misfit | WeightOffload) -> dict[str, Any]:
    parallel = of.parallel
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "data": parallel.data,
        "expert": parallel.expert,
    }


def _fit_json(plan: Plan, fit: Fit) -> dict[str, Any]:
    return {
        "parallel": _parallel_json(fit),
        "gpus_per_replica": fit.parallel.devices,
        "replicas": fit.replicas,
        "gpus": fit.gpus,
        "nodes": fit.nodes(plan.demand.per_node),
        "weights_bytes_per_gpu": fit.share.weights_bytes,
        "kv_bytes_per_token_and_gpu": fit.share.kv_bytes_per_token,
        "kv_room_bytes_per_gpu": fit.free_bytes,
        "sequences_per_replica": fit.sequences,
        "decode_tokens_per_s_each": fit.decode.tokens_per_s_each,
    }


def _decode_json(decode: Decode) -> dict[str, Any]:
    return asdict(decode) | {
        "tokens_per_s": decode.tokens_per_s,
        "tokens_per_s_each": decode.tokens_per_s_each,
    }
