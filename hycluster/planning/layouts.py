"""The search: which cuts of a model over GPUs work, and the one that takes fewest GPUs.

Tensor parallel stays within a node, a node is shared evenly, and what is larger takes whole nodes. Of the layouts that
take fewest GPUs for the sequences asked for, the choice is by: fewest pipeline stages (each adds its time to every
token), experts whole on their ranks (fewer and larger products, and only a token's own experts between nodes), then the
bound on decoding, then the room.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hycluster.errors import SettingsError
from hycluster.planning.architecture import GIB, Architecture
from hycluster.planning.gpus import Gpu
from hycluster.planning.precision import Precision
from hycluster.planning.rules import refusals
from hycluster.planning.shares import RESERVE_GIB, UTILIZATION, DeviceShare, device_share
from hycluster.planning.speed import Decode, decode_bound
from hycluster.settings.parallel import Parallel


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked for.

    Attributes:
        context_tokens: of each sequence, prompt and output.
        concurrency: sequences of that length at a time.
        utilization: of a GPU's memory, what vLLM may use.
        reserve_gib: of that, what is neither weights nor KV cache.
        per_node: GPUs of a node.
        most_gpus: of one replica.
    """

    context_tokens: int
    concurrency: int
    utilization: float = UTILIZATION
    reserve_gib: float = RESERVE_GIB
    per_node: int = 8
    most_gpus: int = 64


@dataclass(frozen=True, slots=True)
class Pinned:
    """The parts of a layout that the user has settled; None is open."""

    tensor: int | None = None
    pipeline: int | None = None
    data: int | None = None
    expert: bool | None = None

    def allows(self, parallel: Parallel) -> bool:
        return all(
            wanted is None or wanted == found
            for wanted, found in (
                (self.tensor, parallel.tensor),
                (self.pipeline, parallel.pipeline),
                (self.data, parallel.data),
                (self.expert, parallel.expert),
            )
        )


@dataclass(frozen=True, slots=True)
class Fit:
    """A layout that works.

    Attributes:
        free_bytes: room for the KV cache on the fullest GPU.
        sequences: of the demand's length that one replica holds at a time.
        replicas: as many as the demand's concurrency takes.
        decode: the bound on decoding at that concurrency, of one replica.
    """

    parallel: Parallel
    share: DeviceShare
    free_bytes: int
    sequences: int
    replicas: int
    decode: Decode

    @property
    def gpus(self) -> int:
        return self.parallel.devices * self.replicas

    def nodes(self, per_node: int) -> int:
        """Nodes that all replicas take, each within one where it can be."""
        if self.parallel.devices >= per_node:
            return self.replicas * math.ceil(self.parallel.devices / per_node)
        return math.ceil(self.replicas / (per_node // self.parallel.devices))


@dataclass(frozen=True, slots=True)
class Misfit:
    """A layout whose weights, with one sequence, are too large for its GPUs.

    Attributes:
        missing_bytes: on the fullest GPU.
    """

    parallel: Parallel
    share: DeviceShare
    missing_bytes: int


@dataclass(frozen=True, slots=True)
class Search:
    """What was found.

    Attributes:
        fits: the best first; none with more than twice its GPUs a replica.
        misfits: of each number of GPUs below the best's, the layout that misses least.
        refused: reasons why vLLM can't do others of at most as many GPUs as the best.
    """

    fits: tuple[Fit, ...]
    misfits: tuple[Misfit, ...]
    refused: tuple[str, ...]


def search(
    model: Architecture, precision: Precision, gpu: Gpu, demand: Workload, pinned: Pinned | None = None
) -> Search:
    """Try every layout.

    Raises:
        SettingsError: the context is longer than the model's, or nothing that was pinned can be.
    """
    if model.positions and demand.context_tokens > model.positions:
        raise SettingsError(
            f"--context-tokens: {demand.context_tokens} is not allowed; this model has {model.positions} positions"
        )
    pinned = pinned or Pinned()
    fits: list[Fit] = []
    refused: dict[str, int] = {}
    misfits: dict[int, Misfit] = {}
    for parallel in candidates(model, demand, pinned):
        if fits and parallel.devices > 2 * min(fit.gpus for fit in fits):
            break
        if reasons := refusals(model, parallel, precision):
            for reason in reasons:
                refused.setdefault(reason, parallel.devices)
            continue
        share = device_share(model, parallel, precision)
        free = share.free_bytes(gpu.memory_gib, demand.utilization, demand.reserve_gib)
        one = share.kv_bytes(demand.context_tokens)
        if free >= one:
            fits.append(_fit(model, parallel, share, free, precision, gpu, demand))
        elif (known := misfits.get(parallel.devices)) is None or one - free < known.missing_bytes:
            misfits[parallel.devices] = Misfit(parallel, share, one - free)
    if not fits:
        raise SettingsError(_nothing(model, gpu, demand, list(misfits.values()), list(refused)))
    ordered = sorted(fits, key=_preference)
    most = ordered[0].parallel.devices
    return Search(
        fits=tuple(ordered),
        misfits=tuple(misfits[devices] for devices in sorted(misfits) if devices < most),
        refused=tuple(reason for reason, devices in refused.items() if devices <= most),
    )


def candidates(model: Architecture, demand: Workload, pinned: Pinned) -> Iterator[Parallel]:
    """Layouts that a cluster of such nodes can hold, and that the user has not excluded; those of fewest GPUs first."""
    parts = [size for size in range(1, demand.per_node + 1) if demand.per_node % size == 0]
    whole = range(2 * demand.per_node, demand.most_gpus + 1, demand.per_node)
    for devices in [*parts, *whole]:
        for tensor in parts:
            if devices % tensor:
                continue
            for pipeline in [pinned.pipeline] if pinned.pipeline else range(1, devices // tensor + 1):
                data, rest = divmod(devices, tensor * pipeline)
                # What makes no sense without experts is tried only if the user asks for it, for the reason.
                if rest or data < 1 or (data > 1 and not model.experts and pinned.data is None):
                    continue
                for expert in (False, True) if model.experts or pinned.expert else (False,):
                    parallel = Parallel(tensor=tensor, pipeline=pipeline, data=data, expert=expert)
                    if pinned.allows(parallel):
                        yield parallel


def _fit(
    model: Architecture,
    parallel: Parallel,
    share: DeviceShare,
    free: int,
    precision: Precision,
    gpu: Gpu,
    demand: Workload,
) -> Fit:
    sequences = free // share.kv_bytes(demand.context_tokens) * parallel.data
    replicas = math.ceil(demand.concurrency / sequences)
    batch = math.ceil(demand.concurrency / replicas)
    decode = decode_bound(model, parallel, share, precision, gpu, batch, demand.context_tokens)
    return Fit(parallel, share, free, sequences, replicas, decode)


def _preference(fit: Fit) -> tuple[float, ...]:
    parallel = fit.parallel
    alone = parallel.expert_ranks == 1
    return (
        fit.gpus,
        parallel.devices,
        parallel.pipeline,
        # On one rank the switch changes nothing.
        parallel.expert if alone else not parallel.expert,
        fit.decode.step_s,
        -fit.sequences,
    )


def _nothing(model: Architecture, gpu: Gpu, demand: Workload, misfits: list[Misfit], refused: list[str]) -> str:
    """Why no layout works, a line a reason."""
    if not misfits and not refused:
        return (
            f"layout: no such layout on nodes of {demand.per_node} GPUs; tensor must divide {demand.per_node}, and a"
            f" replica takes a part of a node or whole nodes, at most {demand.most_gpus} GPUs"
        )
    lines = [f"layout: {reason}" for reason in refused[:8]]
    if misfits:
        best = min(misfits, key=lambda misfit: misfit.missing_bytes)
        usable = gpu.memory_gib * demand.utilization - demand.reserve_gib
        lines.append(
            f"layout: with {describe(best.parallel)} a GPU would hold {best.share.weights_bytes / GIB:.1f} GiB of"
            f" weights and {best.share.kv_bytes(demand.context_tokens) / GIB:.1f} GiB of KV cache for one sequence of"
            f" {demand.context_tokens} tokens; a {gpu.name} has room for {usable:.1f} GiB"
        )
    return "\n".join(lines)


def describe(parallel: Parallel) -> str:
    """``tensor 8, data 2, expert``."""
    words = [
        f"{name} {size}"
        for name, size in (("tensor", parallel.tensor), ("pipeline", parallel.pipeline), ("data", parallel.data))
        if size > 1
    ]
    if parallel.expert and parallel.expert_ranks > 1:
        words.append("expert")
    return ", ".join(words) or "one GPU"
