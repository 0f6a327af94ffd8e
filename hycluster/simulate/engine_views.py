"""What a router knows of engines with vLLM's own scheduler: load by its own counts, prefixes by vLLM's KV events."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from vllm.v1.request import Request

from hycluster.gateway.prefix_router import PoolColumns, PrefixRequest, StepCost
from hycluster.simulate.engine import BlocksChanged, block_names
from hycluster.simulate.prefix_state import PrefixState
from hycluster.simulate.traces import HASH_TOKENS


class EngineViews:
    """Counts of a pool's engines.

    Args:
        block_tokens: of their KV caches.
        by_prefix: what they have cached is looked at.
    """

    def __init__(self, engines: int, cost: StepCost, block_tokens: int, by_prefix: bool) -> None:
        self._cost, self._block_tokens = cost, block_tokens
        self._ids = [str(number) for number in range(engines)]
        self._now_s = 0.0
        self._state = PrefixState(engines) if by_prefix else None
        # By engine, of what it has: those that have no token yet, with what of their prompts was to be computed when
        # they were sent, and those that have some.
        self._unbegun: list[dict[str, tuple[Request, float]]] = [{} for _ in range(engines)]
        self._decoding: list[dict[str, Request]] = [{} for _ in range(engines)]
        self._outstanding = [0] * engines
        self._names: dict[str, list[int]] = {}

    def told(self, engine: int) -> BlocksChanged | None:
        """Whom an engine is to tell of its blocks; None: nobody."""
        return None if self._state is None else partial(self._changed, self._state, engine)

    def view(self, request: Request, in_flight: Sequence[float]) -> tuple[PoolColumns, PrefixRequest]:
        """Of all engines, for a request that comes now.

        Args:
            in_flight: by engine, tokens of prompts in steps that are not over.
        """
        self._now_s = request.arrival_time
        names = [] if self._state is None else block_names(request)
        prompt = request.num_prompt_tokens
        cached = None if self._state is None else self._state.cached_blocks(names) * self._block_tokens
        begin = request.block_hashes[2 * HASH_TOKENS // self._block_tokens - 1 :] or request.block_hashes[-1:]
        if self._state is not None:
            self._names[request.request_id] = names
        view = PoolColumns(
            replica_ids=self._ids,
            outstanding_tokens=np.array(self._outstanding, float),
            requests=np.array([len(a) + len(b) for a, b in zip(self._unbegun, self._decoding, strict=True)], float),
            prefill_tokens=np.array([sum(map(_to_prefill, each.values())) for each in self._unbegun])
            + np.array(in_flight),
            decoding=np.array([len(each) for each in self._decoding], float),
            kv_tokens=np.array(
                [
                    sum(one.num_tokens for one, _ in a.values()) + sum(one.num_tokens for one in b.values())
                    for a, b in zip(self._unbegun, self._decoding, strict=True)
                ],
                float,
            ),
            cached_tokens=cached,
            evicts_age_s=None if self._state is None else self._state.evicts_age_s(self._now_s),
            step=self._cost,
        )
        asked = PrefixRequest(
            prompt_tokens=prompt,
            output_tokens=request.max_tokens,
            prefix=int.from_bytes(begin[0][-8:], "big") if begin else None,
        )
        return view, asked

    def sent(self, engine: int, request: Request, view: PoolColumns, now_s: float) -> None:
        """It was chosen."""
        expected = float(request.num_prompt_tokens)
        if self._state is not None and view.cached_tokens is not None:
            expected -= min(float(view.cached_tokens[engine]), expected - 1)
            self._state.sent(engine, self._names.pop(request.request_id), now_s)
        self._unbegun[engine][request.request_id] = request, expected
        self._outstanding[engine] += request.num_prompt_tokens + request.max_tokens

    def begun(self, engine: int, request_id: str) -> None:
        """It has its first token."""
        request, _ = self._unbegun[engine].pop(request_id)
        self._decoding[engine][request_id] = request
        self._outstanding[engine] -= request.num_prompt_tokens

    def one_token(self, engine: int) -> None:
        self._outstanding[engine] -= 1

    def over(self, engine: int, request_id: str) -> None:
        """It has its last token."""
        del self._decoding[engine][request_id]
        self._outstanding[engine] -= 1

    def _changed(self, state: PrefixState, engine: int, stored: Sequence[int], dropped: Sequence[int]) -> None:
        for block in stored:
            state.stored(engine, block, self._now_s)
        for block in dropped:
            state.dropped(engine, block)


def _to_prefill(waiting: tuple[Request, float]) -> float:
    request, expected = waiting
    computed = request.num_computed_tokens
    return max(0.0, request.num_prompt_tokens - computed) if computed else expected
