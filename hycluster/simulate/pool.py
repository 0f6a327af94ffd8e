"""A trace, and rows of a bulk job, on engines in virtual time."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hycluster.core import Priority
from hycluster.gateway.router import Candidate, Policy, RouteRequest
from hycluster.simulate.bulk import BulkRows
from hycluster.simulate.engine import TokenAt, VirtualEngine
from hycluster.simulate.traces import Prompts, TraceRequest, span_s

# A job's first rows are all prompts, and a scheduler has no steps to learn from: so long is it there before the trace.
LEAD_S = 20.0


@dataclass(slots=True)
class Served:
    """One request of the trace, and what became of it. Times are on the trace's clock."""

    request: TraceRequest
    replica: int = -1
    first_s: float = math.nan
    last_s: float = math.nan
    cached: int = 0

    @property
    def failed(self) -> bool:
        return self.replica < 0

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.request.at_s

    @property
    def tpot_s(self) -> float | None:
        """Between two tokens, on average; None if it has only one."""
        more = self.request.output_tokens - 1
        return (self.last_s - self.first_s) / more if more > 0 else None


@dataclass(slots=True)
class BulkDone:
    """What of a job was done while the trace lasted.

    Attributes:
        all_rows, all_output_tokens: also before and after it.
        over_s: when the last row so far was over, counted from the trace's begin.
    """

    output_tokens: int = 0
    rows: int = 0
    all_rows: int = 0
    all_output_tokens: int = 0
    over_s: float = 0.0


@dataclass(slots=True)
class TraceOutcome:
    """What came of it.

    Attributes:
        window_s: how long the trace lasted: from its first arrival to its last, or as long as was asked for.
        end_s: when all was over, counted from the trace's begin.
        busy_s, clocks_s: by engine, how long it computed, and for how long it was there.
        tokens: by engine, prompt and output tokens of the trace that it was given.
    """

    served: list[Served]
    bulk: BulkDone
    window_s: float
    end_s: float = 0.0
    busy_s: list[float] = field(default_factory=list)
    clocks_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: int = 0


class VirtualPool:
    """Engines behind a router.

    Args:
        policy: chooses an engine for each request of the trace.
        longest: most tokens of a request, prompt and output; longer ones fail.
    """

    def __init__(self, engines: Sequence[VirtualEngine], policy: Policy, longest: int) -> None:
        self._engines = engines
        self._policy = policy
        self._longest = longest
        self._prompts = Prompts()
        self._online: dict[str, Served] = {}
        self._left = [0] * len(engines)
        self._given = [0] * len(engines)
        self._asked = [0] * len(engines)
        self._names = itertools.count()
        self._done = BulkDone()

    def run(
        self, requests: Sequence[TraceRequest], bulk: BulkRows | None = None, window_s: float | None = None
    ) -> TraceOutcome:
        """Serve a trace to its end; a job without an end goes on until then.

        Args:
            window_s: how long the trace lasts, if not until its last arrival.
        """
        endless = bulk is not None and bulk.endless
        begin_s = LEAD_S if endless else 0.0
        window_s = span_s(requests) if window_s is None else window_s
        outcome = TraceOutcome([Served(request) for request in requests], self._done, window_s)
        if bulk is not None:
            for each in self._engines:
                for row in itertools.islice(bulk.rows, bulk.in_flight):
                    self._add_row(each, row, bulk)
        # What is here stays: looking through it for garbage, again and again, takes a fifth of the time.
        gc.freeze()
        coming = iter(outcome.served)
        next_one = next(coming, None)
        while True:
            busy = [each for each in self._engines if each.has_work]
            engine = min(busy, key=lambda each: each.now_s, default=None)
            if next_one is not None and (engine is None or begin_s + next_one.request.at_s <= engine.now_s):
                self._admit(next_one, begin_s)
                next_one = next(coming, None)
            elif engine is None or (endless and next_one is None and self._over(engine, begin_s + window_s)):
                break
            else:
                for token in engine.step():
                    self._take(token, engine, bulk, begin_s, begin_s + window_s)
        outcome.end_s = max(engine.now_s for engine in self._engines) - begin_s
        outcome.clocks_s = [engine.now_s for engine in self._engines]
        outcome.busy_s = [engine.busy_s for engine in self._engines]
        outcome.tokens = self._given
        outcome.steps = sum(engine.steps for engine in self._engines)
        return outcome

    def _over(self, engine: VirtualEngine, end_s: float) -> bool:
        return not self._online and engine.now_s >= end_s

    def until_told(self, feed: BulkRows, tokens: int) -> float:
        """Seconds until a feed without an end has got so many output tokens, spread evenly over the engines."""
        for engine in self._engines:
            for row in itertools.islice(feed.rows, feed.in_flight):
                self._add_row(engine, row, feed)
        while self._done.all_output_tokens < tokens:
            first = min(self._engines, key=lambda each: each.now_s)
            for token in first.step():
                self._take(token, first, feed, 0.0, math.inf)
        return max(engine.now_s for engine in self._engines)

    def _admit(self, served: Served, begin_s: float) -> None:
        request = served.request
        tokens = request.prompt_tokens + request.output_tokens
        if tokens > self._longest:
            return
        candidates = [
            Candidate(replica_id=str(number), own_tokens=self._left[number], own_requests=self._asked[number])
            for number in range(len(self._engines))
        ]
        served.replica = number = int(self._policy.choose(candidates, RouteRequest(tokens=tokens)))
        self._left[number] += tokens
        self._given[number] += tokens
        self._asked[number] += 1
        engine, at_s = self._engines[number], begin_s + request.at_s
        if not engine.has_work:
            engine.now_s = max(engine.now_s, at_s)
        name = f"online-{next(self._names)}"
        self._online[name] = served
        engine.add(name, self._prompts.of(request), request.output_tokens, Priority.ONLINE, at_s)

    def _add_row(self, engine: VirtualEngine, row: TraceRequest, bulk: BulkRows) -> None:
        engine.add(f"bulk-{next(self._names)}", self._prompts.of(row), row.output_tokens, bulk.priority)

    def _take(self, token: TokenAt, engine: VirtualEngine, bulk: BulkRows | None, begin_s: float, end_s: float) -> None:
        if (served := self._online.get(token.request_id)) is not None:
            self._take_online(token, served, begin_s)
            return
        done = self._done
        done.all_output_tokens += 1
        done.output_tokens += begin_s < token.at_s <= end_s
        if token.last:
            done.all_rows += 1
            done.rows += begin_s < token.at_s <= end_s
            done.over_s = token.at_s - begin_s
            if bulk is not None and (row := next(bulk.rows, None)) is not None:
                self._add_row(engine, row, bulk)

    def _take_online(self, token: TokenAt, served: Served, begin_s: float) -> None:
        at_s = token.at_s - begin_s
        self._left[served.replica] -= 1
        if math.isnan(served.first_s):
            served.first_s, served.cached = at_s, token.cached
            self._left[served.replica] -= served.request.prompt_tokens
        if token.last:
            served.last_s = at_s
            self._asked[served.replica] -= 1
            del self._online[token.request_id]
