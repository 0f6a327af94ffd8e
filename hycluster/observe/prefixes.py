"""How well a gateway knows its replicas' KV caches, under ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

from hycluster.observe.catalogue import (
    INGRESS,
    PREFIX_BLOCKS,
    PREFIX_CACHED,
    PREFIX_ERROR,
    PREFIX_PREDICTIONS,
)
from hycluster.observe.watched import Watching


@dataclass(slots=True)
class PrefixAudit:
    """What engines found cached of prompts beside what was predicted when they were sent.

    Attributes:
        predictions: that an engine has answered.
        cached_tokens: that were found.
        missing_tokens: predicted and not found.
        unforeseen_tokens: found and not predicted.
    """

    predictions: int = 0
    cached_tokens: int = 0
    missing_tokens: int = 0
    unforeseen_tokens: int = 0

    def note(self, predicted_tokens: int, cached_tokens: int) -> None:
        self.predictions += 1
        self.cached_tokens += cached_tokens
        self.missing_tokens += max(0, predicted_tokens - cached_tokens)
        self.unforeseen_tokens += max(0, cached_tokens - predicted_tokens)


class FollowedBlocks(Protocol):
    """What a gateway knows of KV blocks."""

    audit: PrefixAudit

    @property
    def blocks(self) -> int:
        """Known of, on all replicas."""


class PrefixMetrics(Watching[FollowedBlocks]):
    """Of all models whose gateway follows its replicas' blocks."""

    def collect(self) -> Iterable[Metric]:
        predictions, cached = PREFIX_PREDICTIONS.counter(), PREFIX_CACHED.counter()
        wrong, blocks = PREFIX_ERROR.counter(), PREFIX_BLOCKS.gauge()
        for model, followed in self.sources:
            audit = followed.audit
            predictions.add_metric([model, INGRESS], audit.predictions)
            cached.add_metric([model, INGRESS], audit.cached_tokens)
            wrong.add_metric([model, "missing", INGRESS], audit.missing_tokens)
            wrong.add_metric([model, "unforeseen", INGRESS], audit.unforeseen_tokens)
            blocks.add_metric([model, INGRESS], followed.blocks)
        return [family for family in (predictions, cached, wrong, blocks) if family.samples]


prefix_metrics = PrefixMetrics()
REGISTRY.register(prefix_metrics)
