"""vLLM's own request metrics, for any number of models in one process.

vLLM's Prometheus logger takes its metrics out of the process's registry whenever another one is made
(``unregister_vllm_metrics``, 0.32.0). So each model's metrics are taken out of the registry as soon as
they are made and shown through one collector that merges the families of all models.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerManager


class _AllModels(Collector):
    def __init__(self) -> None:
        self.by_model: dict[str, list[Collector]] = {}

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for collectors in self.by_model.values():
            for collector in collectors:
                for family in collector.collect():
                    families.setdefault(
                        family.name, Metric(family.name, family.documentation, family.type, family.unit)
                    ).samples.extend(family.samples)
        return families.values()

    def describe(self) -> Iterable[Metric]:
        # Registering must not read values; names can't clash, they are vLLM's own.
        return []


_all_models = _AllModels()


def stat_logger(config: VllmConfig, replicas: int) -> StatLoggerManager:
    """A logger of vLLM's request metrics; the label ``engine`` tells the ``replicas`` apart."""
    if not _all_models.by_model:
        REGISTRY.register(_all_models)
    manager = StatLoggerManager(config, engine_idxs=list(range(replicas)), enable_default_loggers=False)
    made = [c for c in list(REGISTRY._collector_to_names) if getattr(c, "_name", "").startswith("vllm:")]
    for collector in made:
        REGISTRY.unregister(collector)
    _all_models.by_model[str(config.model_config.served_model_name)] = made
    return manager
