"""How mixture-of-experts replicas spread their tokens, under ``/metrics``: what replicas reported last.

A series an expert and replica, summed over layers; by layer it would be as many again for each layer (64 x 16 for
Hunyuan-Large). Replicas are named by their id, so that every ingress process shows the same series.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol
from weakref import WeakValueDictionary

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hycluster.core import ExpertLoad

_REPLICA = ["model", "replica"]


class ExpertsPool(Protocol):
    """What knows the last reports of one model's replicas."""

    @property
    def expert_loads(self) -> Mapping[str, ExpertLoad]:
        """By replica id; replicas that report none are left out."""


class ExpertMetrics(Collector):
    """Reads the pools when it is asked; holds none of them."""

    def __init__(self) -> None:
        self._pools: WeakValueDictionary[str, ExpertsPool] = WeakValueDictionary()

    def watch(self, model: str, pool: ExpertsPool) -> None:
        """Show this model's replicas for as long as ``pool`` lives."""
        self._pools[model] = pool

    def collect(self) -> Iterable[Metric]:
        tokens = CounterMetricFamily(
            "hycluster_expert_tokens",
            "Tokens routed to an expert, summed over layers; a token counts once for each expert it is routed to.",
            labels=[*_REPLICA, "expert"],
        )
        moved = CounterMetricFamily(
            "hycluster_expert_moved_tokens",
            "Tokens that random compensation (routing.recycle) moved from an expert over its capacity to another.",
            labels=_REPLICA,
        )
        share = GaugeMetricFamily(
            "hycluster_expert_moved_share", "Fraction of routed tokens that random compensation moved.", labels=_REPLICA
        )
        skew = GaugeMetricFamily(
            "hycluster_expert_load_skew",
            "Tokens of the busiest expert divided by the mean over experts, in recent steps; 1 is balanced.",
            labels=_REPLICA,
        )
        rank_skew = GaugeMetricFamily(
            "hycluster_expert_rank_load_skew",
            "Tokens of the busiest expert-parallel rank divided by the ranks' mean, in recent steps; 1 is balanced.",
            labels=_REPLICA,
        )
        for model, pool in list(self._pools.items()):
            for replica, load in pool.expert_loads.items():
                labels = [model, replica]
                for expert, count in enumerate(load.tokens):
                    tokens.add_metric([*labels, str(expert)], count)
                moved.add_metric(labels, load.moved)
                share.add_metric(labels, load.moved / max(1, sum(load.tokens)))
                skew.add_metric(labels, load.skew)
                if load.rank_skew is not None:
                    rank_skew.add_metric(labels, load.rank_skew)
        return [family for family in (tokens, moved, share, skew, rank_skew) if family.samples]

    def describe(self) -> Iterable[Metric]:
        # Registering must not read values.
        return []


expert_metrics = ExpertMetrics()
REGISTRY.register(expert_metrics)
