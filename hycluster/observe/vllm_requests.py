"""What vLLM's front end tells of requests: to vLLM's own metrics, for any number of models and replicas in one process,
and to the count of what callers got (``hycluster/traffic.py``).

What the front end counts is recorded here, by a logger of vLLM's for each replica, as vLLM has one for each engine;
what schedulers count comes with the replicas' reports (``hycluster/engine/vllm_metrics.py``). Names and labels are
vLLM's; ``engine`` is 0 as of one engine by itself, and ``replica`` tells them apart. So does
``priority`` with online requests and batch work: nobody waits for the first token of a row, which may wait for hours.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from prometheus_client import REGISTRY, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from vllm.config import VllmConfig
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats

from hycluster.core import EngineSample
from hycluster.engine.vllm_metrics import ENGINE, FRONT_END, PrivateLogger
from hycluster.errors import RequestFailed
from hycluster.observe.catalogue import INGRESS
from hycluster.observe.gateways import KnownReplica, is_batch_source
from hycluster.observe.watched import Watching
from hycluster.traffic import GatewayTraffic, TrafficMeter

# So many steps, or tokens' latencies, are counted at a time: most of what vLLM's logger does for a step is to add
# nothing, and all of it is cold to the processor's caches when the next one comes.
STEPS_AT_ONCE, LATENCIES_AT_ONCE = 1024, 4096
# Of a step's statistics, what is not simply added up, or has been.
TAKEN = frozenset(
    {"iteration_timestamp", "inter_token_latencies_iter", "num_generation_tokens", "prompt_token_stats"}
)  # fmt: skip


class CountedPool(Protocol):
    """A gateway's side of its pool.

    Attributes:
        shows_pool: this process shows what concerns the pool; else another one does.
    """

    shows_pool: bool

    @property
    def known(self) -> Collection[KnownReplica]:
        """Replicas that are connected, and the last ones that were."""

    @property
    def engine_samples(self) -> Mapping[str, tuple[EngineSample, ...]]:
        """By replica id, what its scheduler counted."""


class ModelStats:
    """One model's; stands where ``AsyncLLM`` expects its ``StatLoggerManager``.

    Args:
        pool: numbers its replicas; an output carries which one it is from, and whether it is of batch work
            (:meth:`KnownReplica.source`).
        traffic: is told how requests end.
    """

    def __init__(self, config: VllmConfig, pool: CountedPool, traffic: GatewayTraffic) -> None:
        self._config = config
        self._pool = pool
        self._traffic = traffic
        self._by_replica: dict[int, _Counting] = {}
        self._uncounted: defaultdict[int, _Uncounted] = defaultdict(_Uncounted)
        # Names, types and meanings, of the schedulers' metrics too.
        self._described = {family.name: family for made in PrivateLogger(config).families for family in made.collect()}

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """What one message said. Its scheduler's word has been recorded by the replica."""
        if mm_cache_stats is not None:
            self._of(engine_idx).logger.record(None, None, mm_cache_stats, ENGINE)
        if iteration_stats is None:
            return
        steps = self._uncounted[engine_idx]
        steps.take(iteration_stats)
        if not _only_decodes(iteration_stats):
            steps.take_rest(iteration_stats)
            _tell(self._traffic.of(bulk=is_batch_source(engine_idx)), iteration_stats)
        if len(steps.tokens) >= STEPS_AT_ONCE or len(steps.latencies_s) >= LATENCIES_AT_ONCE:
            self._count(engine_idx)

    def _count(self, number: int) -> None:
        if steps := self._uncounted.pop(number, None):
            self._of(number).count(steps)

    def _of(self, number: int) -> _Counting:
        if number not in self._by_replica:
            self._by_replica[number] = _Counting(self._config)
        return self._by_replica[number]

    def log(self) -> None:
        """``AsyncLLM`` would have its figures logged."""

    def log_engine_initialized(self) -> None:
        """The same at its start."""

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
        """Replicas say it themselves."""

    def record_admission_rejection(self, reason: str) -> None:
        """vLLM's admission control is not asked; see ``Gateway.check_admission``."""

    def families(self, model: str) -> Iterable[Metric]:
        """All there is to be shown here."""
        known = {
            replica.source(bulk=bulk): {"replica": replica.replica_id, "priority": "batch" if bulk else "online"}
            for replica in self._pool.known
            for bulk in (False, True)
        }
        for number in list(self._uncounted):
            self._count(number)
        for number in self._by_replica.keys() - known.keys():
            del self._by_replica[number]
        found: dict[str, Metric] = {}

        def add(name: str, sample: Sample, labels: dict[str, str]) -> None:
            if name not in found:
                said = self._described.get(name)
                # Of what is made only when it is first used: an info, which is a gauge.
                kind, what = (said.type, said.documentation) if said else ("gauge", "vLLM's own.")
                found[name] = Metric(name, what, kind)
            found[name].samples.append(Sample(sample.name, sample.labels | labels, sample.value, None, sample.exemplar))

        for number, whose in known.items():
            if is_batch_source(number) and number not in self._by_replica:
                # Some hundred series, which few services need.
                continue
            labels = {"model": model, **whose, "ingress": INGRESS}
            for collector in self._of(number).families:
                for family in collector.collect():
                    if family.name in FRONT_END:
                        for sample in family.samples:
                            add(family.name, sample, labels)
        if self._pool.shows_pool:
            for replica_id, samples in self._pool.engine_samples.items():
                labels = {"model": model, "replica": replica_id}
                for name, own, value in samples:
                    add(self._family_of(name), Sample(name, dict(own), value), labels)
        return found.values()

    def _family_of(self, sample: str) -> str:
        for ending in ("", "_total", "_bucket", "_count", "_sum"):
            if (name := sample.removesuffix(ending)) in self._described:
                return name
        return sample


class _Uncounted:
    """Steps of one replica that its metrics don't have yet. Nothing of a step is kept but numbers: what lives for some
    steps is work for the garbage collector."""

    __slots__ = ("latencies_s", "rest", "tokens")

    def __init__(self) -> None:
        self.tokens: list[float] = []
        self.latencies_s: list[float] = []
        # The sum of all else.
        self.rest = IterationStats()

    def take(self, step: IterationStats) -> None:
        """What each step has."""
        self.tokens.append(step.prompt_token_stats.computed + step.num_generation_tokens)
        self.latencies_s += step.inter_token_latencies_iter
        self.rest.num_generation_tokens += step.num_generation_tokens

    def take_rest(self, step: IterationStats) -> None:
        """What but few have."""
        whole, prompts = vars(self.rest), vars(self.rest.prompt_token_stats)
        for name, value in vars(step.prompt_token_stats).items():
            prompts[name] += value
        for name, value in vars(step).items():
            if name not in TAKEN:
                whole[name] += value


class _Counting:
    """vLLM's logger for one replica, whose histograms get their values many at a time."""

    def __init__(self, config: VllmConfig) -> None:
        made = PrivateLogger(config)
        self.families = made.families
        self.logger: Any = made.logger
        self._gathered: dict[str, _Gathered] = {}
        for name, histograms in vars(self.logger).items():
            if isinstance(histograms, dict) and isinstance(histograms.get(ENGINE), Histogram):
                self._gathered[name] = histograms[ENGINE] = _Gathered(histograms[ENGINE])

    def count(self, steps: _Uncounted) -> None:
        self.logger.record(None, steps.rest, None, ENGINE)
        # Of the steps' sum the logger has made one value.
        self._gathered["histogram_iteration_tokens"].values = steps.tokens
        self._gathered["histogram_inter_token_latency"].values = steps.latencies_s
        for gathered in self._gathered.values():
            gathered.count()


class _Gathered:
    """In a histogram's place: keeps what it is to observe."""

    def __init__(self, histogram: Any) -> None:
        self._histogram = histogram
        self._bounds = np.array(histogram._upper_bounds)
        self.values: list[float] = []

    def observe(self, value: float) -> None:
        self.values.append(value)

    def count(self) -> None:
        """As the histogram's ``observe`` would each value, which goes through its bounds one by one."""
        if self.values:
            self._histogram._sum.inc(math.fsum(self.values))
            counts = np.bincount(np.searchsorted(self._bounds, self.values))
            for number in counts.nonzero()[0]:
                self._histogram._buckets[number].inc(int(counts[number]))
            self.values = []


def _only_decodes(stats: IterationStats) -> bool:
    """Of running requests there came tokens, and nothing else is to be told of the step."""
    return not (
        stats.finished_requests
        or stats.time_to_first_tokens_iter
        or stats.prompt_token_stats.total
        or stats.num_preempted_reqs
        or stats.max_num_generation_tokens_iter
        or stats.n_params_iter
        or stats.num_corrupted_reqs
        or stats.num_watermarked_reqs
        or stats.num_watermark_skipped_reqs
        or stats.num_not_watermarked_reqs
    )


def _tell(traffic: TrafficMeter, stats: IterationStats) -> None:
    for seconds in stats.time_to_first_tokens_iter:
        traffic.first_token(seconds)
    # Those whose caller left are not among them: ``Gateway.abort``.
    for ended in stats.finished_requests:
        if ended.finish_reason == FinishReason.ERROR:
            traffic.fail(RequestFailed.__name__)
        else:
            traffic.answer(
                ended.num_prompt_tokens,
                ended.num_cached_tokens,
                ended.num_generation_tokens,
                ended.mean_time_per_output_token,
            )


class VllmMetrics(Watching[ModelStats]):
    """Of all models."""

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for model, stats in self.sources:
            for family in stats.families(model):
                if family.name in families:
                    families[family.name].samples.extend(family.samples)
                else:
                    families[family.name] = family
        return families.values()


vllm_metrics = VllmMetrics()
REGISTRY.register(vllm_metrics)
