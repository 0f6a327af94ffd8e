"""What a collector of ours is: it reads what it watches when it is asked, and holds none of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Source = TypeVar("Source")


class Watching(Collector, Generic[Source]):
    """A collector over one source for each model."""

    def __init__(self) -> None:
        self._sources: WeakValueDictionary[str, Source] = WeakValueDictionary()

    def watch(self, model: str, source: Source) -> None:
        """Show this model for as long as ``source`` lives."""
        self._sources[model] = source

    @property
    def sources(self) -> list[tuple[str, Source]]:
        """By model."""
        return list(self._sources.items())

    def describe(self) -> Iterable[Metric]:
        # Registering must not read values.
        return []
