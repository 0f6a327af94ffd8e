"""Counts a gateway's finished requests, as vLLM's front end tells its loggers of them; see ``hycluster/traffic.py``."""

from __future__ import annotations

from collections.abc import Callable

from vllm.v1.engine import FinishReason
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from hycluster.traffic import TrafficMeter


class TrafficLogger(AggregateStatLoggerBase):
    """One of the loggers of a ``StatLoggerManager``.

    Args:
        replica_in: the replica that has a slot of the pool.
    """

    def __init__(self, meter: TrafficMeter, replica_in: Callable[[int], str]) -> None:
        self._meter = meter
        self._replica_in = replica_in

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if iteration_stats is None:
            return
        for seconds in iteration_stats.time_to_first_tokens_iter:
            self._meter.first_token(seconds)
        for ended in iteration_stats.finished_requests:
            if ended.finish_reason == FinishReason.ABORT:
                self._meter.now.cancelled += 1
            elif ended.finish_reason == FinishReason.ERROR:
                self._meter.now.failed += 1
            else:
                self._meter.answered(
                    ended.num_prompt_tokens,
                    ended.num_cached_tokens,
                    ended.num_generation_tokens,
                    ended.mean_time_per_output_token,
                    self._replica_in(engine_idx),
                )

    def log_engine_initialized(self) -> None:
        """There is nothing to be said of it."""
