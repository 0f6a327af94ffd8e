"""Which replica a request goes to, where it is known what each has in its KV cache.

Pure: a view of the pool comes in, a cost for each replica comes out, in an order of magnitude of the policy's own; the
least one is taken, of equal ones any. Columns in place of objects, since a choice among a thousand replicas is to take
microseconds. A gateway makes them of what it has sent and what replicas say (:mod:`hycluster.gateway.router`),
:mod:`hycluster.simulate` of engines in virtual time.

Where ``cached_tokens`` is None, nothing is known of caches, and each policy goes by load.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hycluster.errors import SettingsError, Unavailable

Column = NDArray[np.float64]
# How much more than its own seconds a computed token counts: all that come behind it wait for it, and it takes room
# that others' prefixes had. Found on traces (docs/routing.md): more of it is more hits and longer queues.
COMPUTED_WEIGHT = 4.0
# And more for each request that is there: its steps wait, and where many are, more come back for a next turn.
REQUEST_WEIGHT = 0.05
# What goes is worth so large a share of what it takes to compute it, if it was used just now; half as much if it was
# last used so long ago.
EVICTED_SHARE, EVICTED_HALF_S = 0.3, 60.0
# A home may have so many times the mean of what is outstanding, as in consistent hashing with bounded loads
# (arXiv:1608.01350).
BOUND = 1.25
# Tokens of a block, where a policy counts blocks.
_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class StepCost:
    """How long a replica's steps take, in seconds, and how many tokens of prompts are in one at most."""

    base_s: float
    prefill_token_s: float
    sequence_s: float
    kv_token_s: float
    step_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolColumns:
    """The replicas that can take a request; each column has one entry for each of them.

    Attributes:
        outstanding_tokens: to prefill or to decode, prefixes that are cached among them.
        requests: running and waiting.
        prefill_tokens: to compute before a prompt that comes now: of prompts that are there, without what is cached.
        decoding: rows that decode.
        kv_tokens: of requests that are there.
        cached_tokens: of the request's prompt, from its begin, what is in the replica's KV cache or is going to be,
            since a request for it is there. None: not known.
        evicts_age_s: how long what would go next has not been used; infinite while there is room. None: not known.
        step: None: not known, all of them alike.
    """

    replica_ids: Sequence[str]
    outstanding_tokens: Column
    requests: Column
    prefill_tokens: Column
    decoding: Column
    kv_tokens: Column
    cached_tokens: Column | None = None
    evicts_age_s: Column | None = None
    step: StepCost


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixRequest:
    """What a policy may look at.

    Attributes:
        prefix: names the first blocks of its prompt; None if there is no whole one.
    """

    prompt_tokens: int
    output_tokens: int
    prefix: int | None = None


Costs = Callable[[PoolColumns, PrefixRequest], Column]


def predicted_ttft(view: PoolColumns, request: PrefixRequest) -> Column:
    """Seconds until its first token, with those that it costs others.

    What is to prefill before it, at the pace of steps that have the replica's rows in them; what of it is not cached,
    weighted, since all that come later wait for that, and by the requests that are there; and what has to go for it,
    by how lately that was of use.
    """
    step, new = view.step, _new_tokens(view, request)
    rows_s = step.base_s + step.sequence_s * view.decoding + step.kv_token_s * view.kv_tokens
    token_s = step.prefill_token_s + rows_s / step.step_tokens
    others = COMPUTED_WEIGHT - 1 + REQUEST_WEIGHT * view.requests
    costs: Column = (view.prefill_tokens + new) * token_s + others * new * step.prefill_token_s
    if view.evicts_age_s is not None:
        worth = EVICTED_SHARE / (1 + view.evicts_age_s / EVICTED_HALF_S)
        costs += (new + request.output_tokens) * step.prefill_token_s * worth
    return costs


def prefix_hash(view: PoolColumns, request: PrefixRequest) -> Column:
    """By a hash of the prompt's first blocks alone, and on to the next one where that has more than its share."""
    outstanding = view.outstanding_tokens
    if request.prefix is None:
        return outstanding
    order = _mixed(np.array([zlib.crc32(each.encode()) for each in view.replica_ids], np.uint64), request.prefix)
    bound = BOUND * (outstanding.sum() + request.prompt_tokens + request.output_tokens) / len(outstanding)
    # The least loaded one is never over it.
    return np.where(outstanding <= bound, order, np.inf)


def longest_match(view: PoolColumns, request: PrefixRequest) -> Column:
    """Most of the prompt cached; of equal ones the least tokens outstanding. It does not see queues."""
    if view.cached_tokens is None:
        return view.outstanding_tokens
    best = view.cached_tokens == view.cached_tokens.max()
    return np.where(best, view.outstanding_tokens, np.inf)


def lmetric(view: PoolColumns, request: PrefixRequest) -> Column:
    """Tokens to prefill, with the request's own, times the requests that are there with it."""
    costs: Column = (view.prefill_tokens + _new_tokens(view, request)) * (view.requests + 1)
    return costs


def dynamo(view: PoolColumns, request: PrefixRequest) -> Column:
    """Blocks to prefill and blocks that decoding holds, added up, as Dynamo's KV router has it with its defaults."""
    costs: Column = (view.prefill_tokens + _new_tokens(view, request)) / _BLOCK_TOKENS
    return costs + (view.kv_tokens + request.prompt_tokens) / _BLOCK_TOKENS


PREFIX_POLICIES: dict[str, Costs] = {
    "predicted_ttft": predicted_ttft,
    "prefix_hash": prefix_hash,
    "longest_match": longest_match,
    "lmetric": lmetric,
    "dynamo": dynamo,
}


class PrefixPolicy:
    """The cheapest replica, by one of these functions.

    Args:
        seed: fixes what is left to chance.

    Raises:
        SettingsError: no policy has that name.
    """

    def __init__(self, name: str, seed: int | None = None) -> None:
        if name not in PREFIX_POLICIES:
            raise SettingsError(f"policy: {name!r} is not allowed; must be one of {', '.join(PREFIX_POLICIES)}")
        self._costs = PREFIX_POLICIES[name]
        self._random = random.Random(seed)

    def choose(self, view: PoolColumns, request: PrefixRequest) -> int:
        """The place of the replica in the view.

        Raises:
            Unavailable: there is none.
        """
        if not view.replica_ids:
            raise Unavailable("no replica can take requests now")
        costs = self._costs(view, request)
        best = np.flatnonzero(costs == costs.min())
        return int(best[self._random.randrange(len(best))])


def _new_tokens(view: PoolColumns, request: PrefixRequest) -> Column:
    """By replica, what of the prompt is to be computed; its last token always is."""
    if view.cached_tokens is None:
        return np.full(len(view.replica_ids), float(request.prompt_tokens))
    return np.maximum(request.prompt_tokens - view.cached_tokens, 1.0)


def _mixed(names: NDArray[np.uint64], key: int) -> Column:
    """A number for each name, without order, which another key gives another one: splitmix64."""
    mixed = (names << np.uint64(32)) ^ names ^ np.uint64(key & 0xFFFFFFFFFFFFFFFF)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))).astype(np.float64)
