"""A layer's router as vLLM calls it: chooses experts, knows which rows are tokens, counts what it chose.

``vllm.FusedMoEFactory(custom_routing_function=...)`` takes :func:`router` as it comes; None leaves vLLM's own fused
top-k in place, which is the same as :func:`hycluster.models.recycling.route` and faster.

Reaches into vLLM 0.32.0 for one thing: ``ForwardContext.is_padding``, [rows] bool, which both model runners keep in a
buffer that lives as long as they do, so that a captured CUDA graph sees each step's own mask. Dummy batches (data
parallel ranks without work, graph capture) are all padding. On GPU vLLM's MoE layer is one opaque custom op and
routing runs inside it; on CPU ``torch.compile`` traces through the layer, so there routing is an op of its own here:
traced, the context of the step would become a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.library import custom_op
from vllm.forward_context import get_forward_context, is_forward_context_available

from hycluster.models.recycling import expert_loads, recycle, route
from hycluster.settings.model import Routing
from hycluster.settings.read import validate

# Routers of this process's models, in the order in which the layers were built.
_routers: WeakValueDictionary[int, ExpertRouter] = WeakValueDictionary()
_numbers = count()


def routing_settings(additional_config: object) -> Routing:
    """The routing settings in vLLM's ``additional_config``: ``{"hycluster": {"routing": {...}}}``.

    Raises:
        SettingsError: names the field, its value and what is allowed.
    """
    found = additional_config
    for key in ("hycluster", "routing"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return validate(Routing, found or {}, "additional_config.hycluster.routing")  # type: ignore[arg-type]


def router(num_experts: int, top_k: int, layer: int, settings: Routing) -> ExpertRouter | None:
    """What to give vLLM as ``custom_routing_function``; None where vLLM's own top-k does all that is asked."""
    if settings.recycle is None and not settings.expert_metrics:
        return None
    return ExpertRouter(num_experts, top_k, layer, settings)


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """What one layer's router chose since its model was loaded.

    Attributes:
        tokens: by expert, how many tokens it was given (a token counts once for each of its k experts).
        moved: how many of these were moved by random compensation.
    """

    tokens: list[int]
    moved: int


class ExpertRouter:
    """Routing of one layer; build it where the model is built, so that its counters lie on the model's device.

    Args:
        layer: the layer's number in the model.
    """

    def __init__(self, num_experts: int, top_k: int, layer: int, settings: Routing) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.layer = layer
        self._recycle = settings.recycle
        # One more than there are experts: padded rows are counted for none.
        self._tokens = torch.zeros(num_experts + 1, dtype=torch.int64) if settings.expert_metrics else None
        self._moved = torch.zeros(1, dtype=torch.int64) if settings.expert_metrics else None
        self._number = next(_numbers)
        _routers[self._number] = self

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """vLLM's call of a custom routing function; only the logits, [rows, experts], are of use.

        Returns:
            Weights [rows, k] float32 and expert ids [rows, k] int32.
        """
        if torch.compiler.is_compiling():
            weights, ids = torch.ops.hycluster.route_experts(gating_output, self._number, self.top_k)
            return weights, ids
        return self.choose(gating_output)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Route and count this step's rows."""
        padding = _padding(len(logits))
        if self._recycle is None:
            weights, ids = route(logits, self.top_k)
            moved = None
        else:
            weights, ids, moved = recycle(
                logits,
                self.top_k,
                self._recycle.capacity_factor,
                self._recycle.seed,
                self.layer,
                padding,
                self._recycle.min_capacity_tokens,
            )
        if self._tokens is not None and self._moved is not None:
            real = ids if padding is None else ids.masked_fill(padding[:, None], self.num_experts)
            self._tokens += expert_loads(real, self.num_experts + 1)
            if moved is not None:
                self._moved += moved.sum()
        return weights, ids

    def counts(self) -> LayerCounts | None:
        """What was chosen so far; waits for the device. None if nothing is counted."""
        if self._tokens is None or self._moved is None:
            return None
        return LayerCounts(self._tokens[:-1].tolist(), int(self._moved))


def routed_layers(worker: object = None) -> int:
    """How many layers of this process have a :class:`ExpertRouter`; for ``collective_rpc`` like
    :func:`layer_counts`."""
    return len(_routers)


def layer_counts(worker: object = None) -> dict[int, LayerCounts]:
    """By layer, the counts of this process; in a form that vLLM's ``collective_rpc`` can call on each worker."""
    counts = {router.layer: router.counts() for router in list(_routers.values())}
    return {layer: counted for layer, counted in counts.items() if counted is not None}


def _padding(rows: int) -> Tensor | None:
    """Which rows of this step are no tokens.

    None where the rows are not this rank's own batch: some kernels gather those of all data parallel ranks, or cut
    them up between tensor parallel ranks, before they route. There every row counts as a token.
    """
    if not is_forward_context_available():
        return None
    padding = get_forward_context().is_padding
    return padding if padding is not None and len(padding) == rows else None


@custom_op("hycluster::route_experts", mutates_args=())
def _route_experts(logits: Tensor, number: int, top_k: int) -> tuple[Tensor, Tensor]:
    return _routers[number].choose(logits)


@_route_experts.register_fake
def _(logits: Tensor, number: int, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)
