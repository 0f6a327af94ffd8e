"""What vLLM's front end tells of requests: to vLLM's own metrics, for any number of models and replicas in one process,
and to the count of what callers got (``hycluster/traffic.py``).

What the front end counts is recorded here, by a logger of vLLM's for each replica, as vLLM has one for each engine;
what schedulers count comes with the replicas' reports (``hycluster/engine/vllm_metrics.py``). Names and labels are
vLLM's; ``engine`` is 0 as of one engine by itself, and ``replica`` tells them apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from vllm.config import VllmConfig
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats

from hycluster.core import EngineSample
from hycluster.engine.vllm_metrics import ENGINE, FRONT_END, PrivateLogger
from hycluster.errors import RequestFailed
from hycluster.observe.catalogue import INGRESS
from hycluster.observe.gateways import KnownReplica
from hycluster.observe.watched import Watching
from hycluster.traffic import TrafficMeter

# Steps that only decoded are counted so many at a time: most of what vLLM's logger does for one is to add nothing.
DECODES_AT_ONCE = 64


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
        pool: numbers its replicas; an output carries the number of the one that it is from.
        traffic: is told how requests end.
    """

    def __init__(self, config: VllmConfig, pool: CountedPool, traffic: TrafficMeter) -> None:
        self._config = config
        self._pool = pool
        self._traffic = traffic
        self._by_replica: dict[int, PrivateLogger] = {}
        # By replica, those that are not counted yet.
        self._decodes: defaultdict[int, list[IterationStats]] = defaultdict(list)
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
        if iteration_stats is not None and mm_cache_stats is None and _only_decodes(iteration_stats):
            self._decodes[engine_idx].append(iteration_stats)
            if len(self._decodes[engine_idx]) >= DECODES_AT_ONCE:
                self._count_decodes(engine_idx)
            return
        self._of(engine_idx).logger.record(None, iteration_stats, mm_cache_stats, ENGINE)
        if iteration_stats is not None:
            _tell(self._traffic, iteration_stats)

    def _count_decodes(self, number: int) -> None:
        """As vLLM's logger counts them, but for what stays as it is."""
        logger: Any = self._of(number).logger
        steps = self._decodes.pop(number, [])
        logger.counter_generation_tokens[ENGINE].inc(sum(step.num_generation_tokens for step in steps))
        _observe(logger.histogram_iteration_tokens[ENGINE], [step.num_generation_tokens for step in steps])
        _observe(
            logger.histogram_inter_token_latency[ENGINE],
            [itl_s for step in steps for itl_s in step.inter_token_latencies_iter],
        )

    def _of(self, number: int) -> PrivateLogger:
        if number not in self._by_replica:
            self._by_replica[number] = PrivateLogger(self._config)
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
        known = {replica.number: replica.replica_id for replica in self._pool.known}
        for number in list(self._decodes):
            self._count_decodes(number)
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

        for number, replica_id in known.items():
            labels = {"model": model, "replica": replica_id, "ingress": INGRESS}
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


def _observe(histogram: Any, values: Sequence[float]) -> None:
    """As ``observe`` would each of them, in a quarter of its time: there are two for each token that callers get."""
    histogram._sum.inc(sum(values))
    for number, count in Counter(bisect_left(histogram._upper_bounds, value) for value in values).items():
        histogram._buckets[number].inc(count)


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
