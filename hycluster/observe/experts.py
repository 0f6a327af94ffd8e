"""How mixture-of-experts replicas spread their tokens, under ``/metrics``: what replicas reported last.

A series an expert and replica, summed over layers; by layer it would be as many again for each layer (64 x 16 for
Hunyuan-Large).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

from hycluster.core import ExpertLoad
from hycluster.observe.catalogue import EXPERT_MOVED, EXPERT_MOVED_RATIO, EXPERT_RANK_SKEW, EXPERT_SKEW, EXPERT_TOKENS
from hycluster.observe.watched import Watching


class ExpertsPool(Protocol):
    """What knows the last reports of one model's replicas.

    Attributes:
        shows_pool: this process shows what concerns the pool; else another one does.
    """

    shows_pool: bool

    @property
    def expert_loads(self) -> Mapping[str, ExpertLoad]:
        """By replica id; replicas that report none are left out."""


class ExpertMetrics(Watching[ExpertsPool]):
    """Of all models."""

    def collect(self) -> Iterable[Metric]:
        tokens, moved, share = EXPERT_TOKENS.counter(), EXPERT_MOVED.counter(), EXPERT_MOVED_RATIO.gauge()
        skew, rank_skew = EXPERT_SKEW.gauge(), EXPERT_RANK_SKEW.gauge()
        for model, pool in self.sources:
            if not pool.shows_pool:
                continue
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


expert_metrics = ExpertMetrics()
REGISTRY.register(expert_metrics)
