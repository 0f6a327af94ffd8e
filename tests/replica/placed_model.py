"""A model of which only what it takes of a cluster counts."""

from __future__ import annotations

from typing import Any

from hycluster.settings.model import Model
from hycluster.settings.parallel import Parallel
from hycluster.settings.pool import Hardware, Replicas


def model(name: str = "m", replicas: int = 1, parallel: Parallel | None = None, **hardware: Any) -> Model:
    return Model(
        name=name,
        source="/m",
        hardware=Hardware(**hardware),
        replicas=Replicas(min=replicas),
        parallel=parallel or Parallel(),
    )
