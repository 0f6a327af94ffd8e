"""A trace, and rows of a bulk job, on engines in virtual time."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Sequence

from hycluster.core import Priority
from hycluster.simulate.bulk import BulkRows
from hycluster.simulate.choice import Choice
from hycluster.simulate.engine import TokenAt, VirtualEngine
from hycluster.simulate.engine_views import EngineViews
from hycluster.simulate.outcome import BulkDone, Served, TraceOutcome
from hycluster.simulate.traces import Prompts, TraceRequest, span_s

# A job's first rows are all prompts, and a scheduler has no steps to learn from: so long is it there before the trace.
LEAD_S = 20.0


class VirtualPool:
    """Engines behind a router.

    Args:
        views: what the router knows of them.
        choice: an engine for each request of the trace.
        longest: most tokens of a request, prompt and output; longer ones fail.

    Attributes:
        engines: as they are given.
    """

    def __init__(self, engines: Sequence[VirtualEngine], views: EngineViews, choice: Choice, longest: int) -> None:
        self.engines = engines
        self._views = views
        self._choice = choice
        self._longest = longest
        self._prompts = Prompts()
        self._online: dict[str, Served] = {}
        self._given = [0] * len(engines)
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
            for each in self.engines:
                for row in itertools.islice(bulk.rows, bulk.in_flight):
                    self._add_row(each, row, bulk)
        # What is here stays: looking through it for garbage, again and again, takes a fifth of the time.
        gc.freeze()
        coming = iter(outcome.served)
        next_one = next(coming, None)
        while True:
            busy = [each for each in self.engines if each.has_work]
            engine = min(busy, key=lambda each: each.now_s, default=None)
            if next_one is not None and (engine is None or begin_s + next_one.request.at_s <= engine.now_s):
                self._admit(next_one, begin_s)
                next_one = next(coming, None)
            elif engine is None or (endless and next_one is None and self._over(engine, begin_s + window_s)):
                break
            else:
                for token in engine.step():
                    self._take(token, engine, bulk, begin_s, begin_s + window_s)
        outcome.end_s = max(engine.now_s for engine in self.engines) - begin_s
        outcome.clocks_s = [engine.now_s for engine in self.engines]
        outcome.busy_s = [engine.busy_s for engine in self.engines]
        outcome.tokens = self._given
        outcome.decisions_s = self._choice.took_s
        outcome.steps = sum(engine.steps for engine in self.engines)
        return outcome

    def _over(self, engine: VirtualEngine, end_s: float) -> bool:
        return not self._online and engine.now_s >= end_s

    def until_told(self, feed: BulkRows, tokens: int) -> float:
        """Seconds until a feed without an end has got so many output tokens, spread evenly over the engines."""
        for engine in self.engines:
            for row in itertools.islice(feed.rows, feed.in_flight):
                self._add_row(engine, row, feed)
        while self._done.all_output_tokens < tokens:
            first = min(self.engines, key=lambda each: each.now_s)
            for token in first.step():
                self._take(token, first, feed, 0.0, math.inf)
        return max(engine.now_s for engine in self.engines)

    def _admit(self, served: Served, begin_s: float) -> None:
        request = served.request
        tokens = request.prompt_tokens + request.output_tokens
        if tokens > self._longest:
            return
        at_s = begin_s + request.at_s
        made = self.engines[0].made(
            f"online-{next(self._names)}", self._prompts.of(request), request.output_tokens, Priority.ONLINE, at_s
        )
        begun = time.perf_counter()
        view, asked = self._views.view(made, [engine.prefill_in_flight(at_s) for engine in self.engines])
        served.replica = number = self._choice.choose(view, asked)
        self._choice.note_time(begun)
        self._views.sent(number, made, view, at_s)
        self._given[number] += tokens
        engine = self.engines[number]
        if not engine.has_work:
            engine.now_s = max(engine.now_s, at_s)
        self._online[made.request_id] = served
        engine.add_made(made)

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
        if math.isnan(served.first_s):
            served.first_s, served.cached = at_s, token.cached
            self._views.begun(served.replica, token.request_id)
        if token.last:
            served.last_s = at_s
            self._views.over(served.replica, token.request_id)
            del self._online[token.request_id]
        else:
            self._views.one_token(served.replica)
