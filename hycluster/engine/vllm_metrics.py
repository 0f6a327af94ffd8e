"""vLLM's own metrics of one engine: those that its scheduler makes, counted where the scheduler is.

vLLM counts all in the front end, by what an engine's outputs say of its steps. Here an engine has several front ends, a
step's counts are in one message to one of them, and that may be a job's, which shows no metrics; so what the scheduler
says is recorded by the replica, by vLLM's own code, and travels with its report. What the front end itself counts
(requests, tokens, latencies) stays there (``hycluster/observe/vllm_requests.py``).

Pinned to vLLM 0.32.0 (``docs/reaches.md``).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import REGISTRY, Gauge
from prometheus_client.registry import Collector
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from hycluster.core import EngineSample

ENGINE = 0
# Families that vLLM's front end counts; all others are the scheduler's. Its own admission control is never asked here:
# ``hycluster_requests_refused_total`` counts refusals.
FRONT_END = frozenset(
    {
        "vllm:corrupted_requests", "vllm:watermark_requests", "vllm:mm_cache_queries", "vllm:mm_cache_hits",
        "vllm:num_preemptions", "vllm:prompt_tokens", "vllm:prompt_tokens_by_source", "vllm:prompt_tokens_cached",
        "vllm:generation_tokens", "vllm:request_success", "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens", "vllm:iteration_tokens_total", "vllm:request_max_num_generation_tokens",
        "vllm:request_params_n", "vllm:request_params_max_tokens", "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds", "vllm:request_time_per_output_token_seconds",
        "vllm:e2e_request_latency_seconds", "vllm:request_queue_time_seconds", "vllm:request_inference_time_seconds",
        "vllm:request_prefill_time_seconds", "vllm:request_decode_time_seconds", "vllm:request_num_preemptions",
        "vllm:request_prefill_kv_computed_tokens",
    }
)  # fmt: skip
NEVER = frozenset({"vllm:admission_rejections"})
ADAPTERS = "vllm:lora_requests_info"


class PrivateLogger:
    """vLLM's Prometheus logger for one engine, whose metrics are not in the process's registry.

    vLLM takes those of the logger before out of it whenever another one is made (``unregister_vllm_metrics``).

    Attributes:
        logger: to record with.
        families: its metrics.
    """

    def __init__(self, config: VllmConfig) -> None:
        self.logger = PrometheusStatLogger(config, [ENGINE])
        self.logger.log_engine_initialized()
        self.families: list[Collector] = []
        for made in list(REGISTRY._collector_to_names):
            if getattr(made, "_name", "").startswith("vllm:"):
                REGISTRY.unregister(made)
                self.families.append(made)


class SchedulerMetrics:
    """What one engine's scheduler did, by vLLM's names."""

    def __init__(self, config: VllmConfig) -> None:
        self._made = PrivateLogger(config)
        lora = config.lora_config
        self._max_adapters = str(lora.max_loras) if lora is not None else None

    def record(self, stats: SchedulerStats) -> None:
        """Of one step."""
        self._made.logger.record(stats, None, engine_idx=ENGINE)

    def samples(
        self,
        *,
        running: int,
        waiting: int,
        deferred: int,
        kv_usage: float,
        sleep_level: int,
        requests: Iterable[Request],
    ) -> tuple[EngineSample, ...]:
        """All of them now. Steps tell what they saw, and a request that is aborted last is in no step: so what there
        is now is asked for.

        Args:
            waiting: all that wait; ``deferred`` are some of them.
            sleep_level: 0 is awake.
            requests: that are in work, for what adapters they have.
        """
        logger = self._made.logger
        _put(logger.gauge_scheduler_running, running)
        _put(logger.gauge_scheduler_waiting, waiting)
        _put(logger.gauge_waiting_by_reason["capacity"], waiting - deferred)
        _put(logger.gauge_waiting_by_reason["deferred"], deferred)
        _put(logger.gauge_kv_cache_usage, kv_usage)
        logger.record_sleep_state(int(sleep_level > 0), sleep_level)
        found = [
            (sample.name, tuple(sample.labels.items()), float(sample.value))
            for collector in self._made.families
            for family in collector.collect()
            if family.name not in FRONT_END | NEVER and family.name != ADAPTERS
            for sample in family.samples
            if not sample.name.endswith("_created")
        ]
        if self._max_adapters is not None:
            found.append(_adapters(self._max_adapters, requests))
        return tuple(found)


def _put(gauges: Mapping[int, Any], value: float) -> None:
    gauge: Gauge = gauges[ENGINE]
    gauge.set(value)


def _adapters(most: str, requests: Iterable[Request]) -> EngineSample:
    """Which adapters are asked for; the value is the time, as the Gateway API's inference extension has it."""
    running: set[str] = set()
    waiting: set[str] = set()
    for request in requests:
        if request.lora_request is not None:
            names = running if request.status == RequestStatus.RUNNING else waiting
            names.add(request.lora_request.lora_name)
    labels = {
        "max_lora": most,
        "running_lora_adapters": ",".join(sorted(running)),
        "waiting_lora_adapters": ",".join(sorted(waiting)),
    }
    return ADAPTERS, tuple(labels.items()), time.time()
