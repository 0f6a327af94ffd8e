"""Which experts a token goes to: plain top-k, or top-k with random compensation ("recycle routing").

Plain: softmax in float32, then the k best. Top-1 weighs its expert by the raw softmax probability; k > 1
renormalizes over the chosen ones.

Random compensation (Hunyuan-Large, arXiv 2411.02265, trains with it) bounds what one step asks of one expert:

- An expert's capacity is ``ceil(capacity_factor * tokens * k / experts)``, counted over this step's real tokens, or
  ``min_capacity`` if that is more. Padded rows take no capacity, are not moved and are not counted.
- An expert over its capacity keeps the tokens that have the best probability for it (ties: the lowest row). They
  lose most by moving; by row, the same requests would be moved in every step.
- The others go to free places, drawn at random over all experts that have room, so an expert is drawn in
  proportion to its room. A token never gets an expert that it has already. It weighs its new expert by that
  expert's own gate probability.
- Nothing is lost: who finds no place stays where it was, over capacity.

The draw is a hash of (seed, layer, row, the step's load of each expert), without a generator's state: the same batch
gets the same experts, whatever ran before, on every rank that sees the same logits. The loads are in it so that a
sequence that keeps its row is not moved to the same place in every step; as whole numbers they bear rounding noise.

Nothing here waits for the device, and no shape depends on data, so all of it can be captured in a CUDA graph and
traced by ``torch.compile``. With data parallel ranks each rank routes its own tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF
# ceil() of a product of decimals that is whole but for rounding must not be one more.
_ROUNDING = 1e-9


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Plain routing.

    Args:
        logits: the router's, [tokens, experts], any float type.

    Returns:
        Weights [tokens, k] float32 and expert ids [tokens, k] int32, the best first.
    """
    weights, ids = _probabilities(logits).topk(top_k, dim=-1)
    return _weigh(weights), ids.to(torch.int32)


def recycle(
    logits: Tensor,
    top_k: int,
    capacity_factor: float,
    seed: int,
    layer: int = 0,
    padding: Tensor | None = None,
    min_capacity: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Routing with random compensation; the module's docstring has the rules.

    Args:
        logits: the router's, [tokens, experts], any float type.
        capacity_factor: an expert's capacity over its fair share. From 1 on there is a place for every token.
        layer: varies the draw from layer to layer.
        padding: [tokens] bool, True for rows that are no tokens; None if all are.
        min_capacity: tokens that an expert may always have.

    Returns:
        Weights [tokens, k] float32 and expert ids [tokens, k] int32, the best first, and how many of the k places of
        each token were moved, [tokens] int64.
    """
    tokens, experts = logits.shape
    probabilities = _probabilities(logits)
    weights, ids = probabilities.topk(top_k, dim=-1)
    # Padded rows count for an expert that there is not.
    chosen = ids if padding is None else ids.masked_fill(padding[:, None], experts)
    loads = expert_loads(chosen, experts + 1)
    real = loads[:experts].sum() / top_k
    capacity = torch.ceil(real.double() * (capacity_factor * top_k / experts) - _ROUNDING).long()
    capacity = capacity.clamp_min(min_capacity)
    over = _over_capacity(chosen, weights, loads, capacity, experts)
    room = (capacity - loads[:experts]).clamp_min(0)
    order = _shuffled(tokens, loads[:experts], seed, layer)
    if top_k == 1:
        ids, moved = _place_one(ids, over, room, order)
    else:
        ids, moved = _place_many(ids, over, room, order, probabilities)
    return _weigh(probabilities.gather(1, ids)), ids.to(torch.int32), moved


def expert_loads(ids: Tensor, experts: int) -> Tensor:
    """How often each expert was chosen: [experts] int64 of ids [tokens, k]."""
    flat = ids.reshape(-1).long()
    return torch.zeros(experts, dtype=torch.int64, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))


def _probabilities(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1, dtype=torch.float32)


def _weigh(probabilities: Tensor) -> Tensor:
    """Weights of the chosen experts, [tokens, k], from their probabilities."""
    if probabilities.shape[1] == 1:
        return probabilities
    # All k can have underflown to 0 where random compensation chose them.
    total = probabilities.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return probabilities / total


def _over_capacity(chosen: Tensor, weights: Tensor, loads: Tensor, capacity: Tensor, experts: int) -> Tensor:
    """Which choices are beyond their expert's capacity: [tokens, k] bool."""
    flat = chosen.reshape(-1)
    # One stable sort by expert, then by falling probability: a positive float's bits rise with it.
    bits = weights.reshape(-1).contiguous().view(torch.int32).long()
    by_expert = torch.argsort((flat << 32) + (_MASK_32 - bits), stable=True)
    starts = loads.cumsum(0) - loads
    place = torch.arange(flat.numel(), device=flat.device) - starts[flat[by_expert]]
    over = torch.empty_like(flat, dtype=torch.bool).scatter_(0, by_expert, place >= capacity)
    return (over & (flat < experts)).view_as(chosen)


def _shuffled(tokens: int, loads: Tensor, seed: int, layer: int) -> Tensor:
    """A random order of the rows: [tokens] int64."""
    state = _hash(torch.zeros((), dtype=torch.int64, device=loads.device) + _constant(seed, layer))
    state = _hash(state + (_hash(torch.arange(loads.numel(), device=loads.device)) * loads).sum())
    return torch.argsort(_hash(_hash(torch.arange(tokens, device=loads.device)) ^ state), stable=True)


def _constant(seed: int, layer: int) -> int:
    return (seed * 0x9E3779B1 + layer * 0x85EBCA77) & _MASK_32


def _hash(x: Tensor) -> Tensor:
    """32 well-mixed bits of each int64 (two rounds of multiply and shift)."""
    x = x & _MASK_32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK_32
    return x ^ (x >> 16)


def _place_one(ids: Tensor, over: Tensor, room: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1: the i-th token to be moved, in random order, takes the i-th free place."""
    waiting = over[order, 0]
    places = room.cumsum(0)
    number = waiting.cumsum(0) - 1
    target = torch.searchsorted(places, number, right=True)
    found = waiting & (number < places[-1])
    moved = torch.empty_like(found).scatter_(0, order, found)
    target = torch.empty_like(target).scatter_(0, order, target)
    return torch.where(moved, target, ids[:, 0])[:, None], moved.long()


def _place_many(ids: Tensor, over: Tensor, room: Tensor, order: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Top-k: expert after expert takes, in random order, tokens that wait and do not have it.

    A pass an expert, so its cost grows with their number; no smaller fixed number of passes would place all.
    """
    tokens, experts = probabilities.shape
    # [experts, tokens], rows in random order: each pass reads one contiguous row.
    has = torch.zeros(tokens, experts, dtype=torch.int64, device=ids.device)
    has = has.scatter_(1, ids, (~over).long()).bool()[order].t().contiguous()
    waiting = over.sum(dim=1)[order]
    took = []
    for expert in range(experts):
        may = (waiting > 0) & ~has[expert]
        takes = may & (may.cumsum(0) <= room[expert])
        waiting = waiting - takes.long()
        took.append(takes)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(tokens, device=order.device))
    has = (has | torch.stack(took)).t()[back]
    # Without a place: the best of a token's surplus choices stay.
    stays = over & (over.cumsum(dim=1) <= waiting[back][:, None])
    has = has | torch.zeros_like(has, dtype=torch.int64).scatter_(1, ids, stays.long()).bool()
    ids = probabilities.masked_fill(~has, -1.0).topk(ids.shape[1], dim=-1).indices
    return ids, (over & ~stays).sum(dim=1)
