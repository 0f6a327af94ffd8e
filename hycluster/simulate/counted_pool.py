"""A trace on engines by their counts: hundreds of them, and a trace of an hour in about a minute."""

from __future__ import annotations

import functools
import heapq
import math
import time
from collections.abc import Sequence

import numpy as np

from hycluster.gateway.prefix_router import PoolColumns, PrefixRequest, StepCost
from hycluster.simulate.choice import Choice
from hycluster.simulate.counted_engine import COLUMNS, CountedEngine, CountedRow, CountedSizes
from hycluster.simulate.outcome import BulkDone, Served, TraceOutcome
from hycluster.simulate.prefix_state import PrefixState
from hycluster.simulate.step_work import StepSeconds
from hycluster.simulate.traces import HASH_TOKENS, TraceRequest, span_s


class FastPool:
    """Engines behind a router.

    Args:
        longest: most tokens of a request, prompt and output; longer ones fail.
    """

    def __init__(
        self,
        replicas: int,
        sizes: CountedSizes,
        step_time: StepSeconds,
        cost: StepCost,
        choice: Choice,
        longest: int,
    ) -> None:
        self._choice, self._cost, self._longest = choice, cost, longest
        self._prefix_caching = sizes.prefix_caching
        self._now_s = 0.0
        self._state = PrefixState(replicas)
        self._engines = [
            CountedEngine(
                sizes,
                step_time,
                functools.partial(self._stored, replica),
                functools.partial(self._dropped, replica),
            )
            for replica in range(replicas)
        ]
        self._ids = [str(replica) for replica in range(replicas)]
        self._columns = np.zeros((replicas, COLUMNS))
        self._given = [0] * replicas
        # When an engine's step is over; what is no longer so is passed over.
        self._events: list[tuple[float, int]] = []

    def run(self, requests: Sequence[TraceRequest]) -> TraceOutcome:
        """Serve a trace to its end."""
        served = [Served(request) for request in requests]
        outcome = TraceOutcome(served, BulkDone(), span_s(requests))
        for number, one in enumerate(served):
            self._until(one.request.at_s, served)
            self._now_s = one.request.at_s
            self._admit(one, number)
        self._until(math.inf, served)
        outcome.end_s = self._now_s
        outcome.clocks_s = [engine.over_s for engine in self._engines]
        outcome.busy_s = [engine.busy_s for engine in self._engines]
        outcome.tokens = self._given
        outcome.steps = sum(engine.steps for engine in self._engines)
        outcome.decisions_s = self._choice.took_s
        return outcome

    def _until(self, at_s: float, served: Sequence[Served]) -> None:
        """All steps that are over before that."""
        while self._events and self._events[0][0] < at_s:
            over_s, replica = heapq.heappop(self._events)
            engine = self._engines[replica]
            if engine.next_s != over_s:
                continue
            self._now_s = over_s
            first, last = engine.finish_step()
            for row in first:
                served[row.number].first_s, served[row.number].cached = over_s, row.cached
            for row in last:
                served[row.number].last_s = over_s
            self._changed(replica)

    def _admit(self, served: Served, number: int) -> None:
        request = served.request
        tokens = request.prompt_tokens + request.output_tokens
        if tokens > self._longest:
            return
        begun = time.perf_counter()
        blocks = request.hash_ids[: request.prompt_tokens // HASH_TOKENS] if self._prefix_caching else ()
        view = self._view(blocks)
        asked = PrefixRequest(
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            prefix=hash(blocks[:2]) if blocks else None,
        )
        served.replica = replica = self._choice.choose(view, asked)
        self._choice.note_time(begun)
        expected = request.prompt_tokens
        if view.cached_tokens is not None:
            expected -= min(int(view.cached_tokens[replica]), request.prompt_tokens - 1)
            self._state.sent(replica, blocks, self._now_s)
        self._given[replica] += tokens
        row = CountedRow(number, request.prompt_tokens, request.output_tokens, blocks, self._now_s, expected)
        self._engines[replica].add(row, self._now_s)
        self._changed(replica)

    def _changed(self, replica: int) -> None:
        engine = self._engines[replica]
        self._columns[replica] = engine.columns()
        if engine.next_s < math.inf:
            heapq.heappush(self._events, (engine.next_s, replica))

    def _view(self, blocks: Sequence[int]) -> PoolColumns:
        outstanding, requests, prefill, decoding, kv_tokens, begun_s, pace, prefill_pace = self._columns.T
        # Of the step that goes on, as much as has passed of it.
        elapsed_s = np.maximum(self._now_s - begun_s, 0.0)
        by_prefix = self._choice.by_prefix
        return PoolColumns(
            replica_ids=self._ids,
            outstanding_tokens=outstanding - pace * elapsed_s,
            requests=requests,
            prefill_tokens=np.maximum(prefill - prefill_pace * elapsed_s, 0.0),
            decoding=decoding,
            kv_tokens=kv_tokens,
            cached_tokens=self._state.cached_blocks(blocks) * HASH_TOKENS if by_prefix else None,
            evicts_age_s=self._state.evicts_age_s(self._now_s) if by_prefix else None,
            step=self._cost,
        )

    def _stored(self, replica: int, block: int) -> None:
        if self._choice.by_prefix:
            self._state.stored(replica, block, self._now_s)

    def _dropped(self, replica: int, block: int) -> None:
        if self._choice.by_prefix:
            self._state.dropped(replica, block)
