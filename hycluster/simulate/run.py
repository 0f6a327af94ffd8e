"""A trace beside a job, and what both would be without the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hycluster.core import Priority
from hycluster.engine.scheduler import colocation_load
from hycluster.errors import SettingsError
from hycluster.settings.model import Colocation
from hycluster.simulate.bulk import LEAST_IN_FLIGHT, BulkJob, BulkRows
from hycluster.simulate.choice import Choice
from hycluster.simulate.engine import BlocksChanged, VirtualEngine
from hycluster.simulate.engine_views import EngineViews
from hycluster.simulate.figures import latencies, trace_figures
from hycluster.simulate.machine import Machine
from hycluster.simulate.outcome import TraceOutcome
from hycluster.simulate.pool import VirtualPool
from hycluster.simulate.traces import TraceRequest, scaled, span_s

# How long a job alone is looked at.
ALONE_S = 120.0
# vLLM's priority policy as it is.
PRIORITY_ONLY = Colocation(enabled=False)
# A load is met to a few percent after so many tries: what a share of the requests has of common prefixes is not known
# before.
_TRIES = 2


@dataclass(frozen=True, slots=True)
class Simulation:
    """Replicas in virtual time.

    Attributes:
        colocation: how online and bulk rows share an engine.
        policy: of the router, by its name in the settings.
        seed: of what is left to chance.
    """

    machine: Machine
    colocation: Colocation
    replicas: int = 1
    policy: str = "predicted_ttft"
    seed: int = 0

    def engine(self, colocation: Colocation, blocks: BlocksChanged | None = None) -> VirtualEngine:
        machine = self.machine
        return VirtualEngine(machine.config(colocation), machine.kv_blocks, machine.step_time, machine.experts, blocks)

    def serve(self, requests: Sequence[TraceRequest], job: BulkJob | None) -> tuple[TraceOutcome, dict[str, Any]]:
        """Serve a trace, beside a job if there is one.

        Raises:
            SettingsError: a row of the job can't be in an engine.
        """
        if job is not None and job.prompt_tokens + job.output_tokens > self._longest:
            raise SettingsError(
                f"--bulk: {job.prompt_tokens}:{job.output_tokens} is not allowed; must be at most {self._longest}"
                " tokens together"
            )
        pool = self._pool(self.colocation)
        outcome = pool.run(requests, job.rows(self.machine) if job is not None else None)
        found = trace_figures(outcome, self.machine, self.replicas)
        if job is not None:
            online_s = sum(engine.online_s for engine in pool.engines)
            loads = [load for engine in pool.engines if (load := colocation_load(engine.scheduler)) is not None]
            found["bulk"] = {
                "rows": outcome.bulk.rows if job.count is None else outcome.bulk.all_rows,
                "output_tokens": outcome.bulk.output_tokens,
                "tokens_per_s": outcome.bulk.output_tokens / outcome.window_s if outcome.window_s else None,
                "over_s": None if job.count is None else outcome.bulk.over_s,
                "given_up": sum(load.given_up for load in loads),
                "slowdown": sum(engine.added_s for engine in pool.engines) / online_s if online_s else None,
            }
        return outcome, found

    def compare(self, requests: Sequence[TraceRequest], job: BulkJob) -> dict[str, Any]:
        """What the trace and the job would be without the other, on vLLM's own scheduler."""
        alone, load = self.alone(requests), self.load_of(requests)
        bulk = self.bulk_alone(job)
        return {
            "alone": latencies(alone),
            "online_load": load,
            "bulk_alone_tokens_per_s": bulk,
            "left_over_tokens_per_s": bulk * max(0.0, 1 - load),
        }

    def alone(self, requests: Sequence[TraceRequest]) -> TraceOutcome:
        """The trace without a job."""
        return self._pool(PRIORITY_ONLY).run(requests)

    def bulk_alone(self, job: BulkJob) -> float:
        """Output tokens a second of a job without online work and without an end."""
        rows = job.endless.rows(self.machine)
        outcome = self._pool(PRIORITY_ONLY).run([], rows, ALONE_S)
        return outcome.bulk.output_tokens / ALONE_S

    def load_of(self, requests: Sequence[TraceRequest]) -> float:
        """Which share of the engines' capacity a trace takes.

        That is how long they take for its requests if these do not come by and by but are always there, against how
        long the trace is. 0 for a trace without length.
        """
        span, fit = span_s(requests), [each for each in requests if self._fits(each)]
        if not span or not fit:
            return 0.0
        pool = self._pool(PRIORITY_ONLY)
        in_flight = 2 * int(self.machine.scheduling.get("max_num_seqs", LEAST_IN_FLIGHT))
        tokens = sum(each.output_tokens for each in fit)
        feed = BulkRows(_again_and_again(fit), in_flight, endless=True, priority=Priority.ONLINE)
        return pool.until_told(feed, tokens) / span

    def scale_for(self, requests: Sequence[TraceRequest], load: float) -> float:
        """How many times a trace is so large a share of the capacity."""
        scale = 1.0
        for _ in range(_TRIES):
            found = self.load_of(scaled(requests, scale, self.seed))
            if not found:
                raise SettingsError("--load: this trace has no load to scale; must have two requests at two times")
            scale *= load / found
        return scale

    @property
    def _longest(self) -> int:
        return min(self.machine.max_model_len, self.machine.kv_tokens)

    def _fits(self, request: TraceRequest) -> bool:
        return request.prompt_tokens + request.output_tokens <= self._longest

    def _pool(self, colocation: Colocation) -> VirtualPool:
        choice, machine = Choice(self.policy, self.seed), self.machine
        views = EngineViews(self.replicas, machine.step_cost, machine.block_tokens, choice.by_prefix)
        engines = [self.engine(colocation, views.told(number)) for number in range(self.replicas)]
        return VirtualPool(engines, views, choice, self._longest)


def _again_and_again(requests: Sequence[TraceRequest]) -> Iterator[TraceRequest]:
    """A trace's requests in their order; then those of as many other users."""
    for number in itertools.count():
        for request in requests:
            yield request.of_others(number)
