"""Which replicas there are: one small Ray actor that replicas report to and gateways ask.

All of its state is soft. Replicas report twice a second; one that has not for a while is dropped.
Losing the directory loses nothing: Ray starts it again, the next reports fill it, and gateways go on
with what they last heard.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.actor import ActorHandle

from hycluster.config import Model
from hycluster.core import ReplicaAddress, ReplicaLoad

NAMESPACE = "hycluster"
SHARED_DIRECTORY = "hycluster-directory"
REPORT_EVERY_S = 0.5
FORGET_AFTER_S = 10.0


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a replica says of itself: where it is, what it does, and whether it takes new requests."""

    address: ReplicaAddress
    load: ReplicaLoad
    accepting: bool = True


@dataclass(frozen=True, slots=True)
class PoolView:
    """What a gateway is told of one model's pool. Loads carry the outstanding tokens of all gateways."""

    model: Model | None
    replicas: list[ReplicaReport]


@dataclass(slots=True)
class _Pool:
    model: Model | None = None
    reports: dict[str, tuple[float, ReplicaReport]] = field(default_factory=dict)
    outstanding: dict[str, tuple[float, dict[str, int]]] = field(default_factory=dict)


class Directory:
    """The actor's class; plain Python, so tests use it as it is."""

    def __init__(self) -> None:
        self._pools: dict[str, _Pool] = {}

    def report(self, model: Model, report: ReplicaReport) -> None:
        """A replica is there."""
        pool = self._pools.setdefault(model.name, _Pool())
        pool.model = model
        pool.reports[report.address.replica_id] = (time.monotonic(), report)

    def leave(self, model: str, replica_id: str) -> None:
        """A replica has gone, in good order."""
        if model in self._pools:
            self._pools[model].reports.pop(replica_id, None)

    def sync(self, model: str, gateway_id: str, outstanding: dict[str, int]) -> PoolView:
        """A gateway says what it has outstanding on each replica and hears of the pool."""
        pool = self._pools.get(model)
        if pool is None:
            return PoolView(None, [])
        now = time.monotonic()
        pool.outstanding[gateway_id] = (now, outstanding)
        pool.outstanding = {g: said for g, said in pool.outstanding.items() if now - said[0] < FORGET_AFTER_S}
        pool.reports = {r: said for r, said in pool.reports.items() if now - said[0] < FORGET_AFTER_S}
        return PoolView(pool.model, [self._with_outstanding(pool, report) for _, report in pool.reports.values()])

    def models(self) -> dict[str, int]:
        """Model names and how many replicas of each take requests."""
        now = time.monotonic()
        return {
            name: sum(report.accepting and now - at < FORGET_AFTER_S for at, report in pool.reports.values())
            for name, pool in self._pools.items()
        }

    @staticmethod
    def _with_outstanding(pool: _Pool, report: ReplicaReport) -> ReplicaReport:
        replica_id = report.address.replica_id
        tokens = {gateway: said.get(replica_id, 0) for gateway, (_, said) in pool.outstanding.items()}
        return replace(report, load=replace(report.load, outstanding_tokens=tokens))


def open_directory(name: str = SHARED_DIRECTORY) -> ActorHandle[Any]:
    """The directory of that name, started if there is none. It lives as long as the Ray cluster."""
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)(Directory)
    handle: ActorHandle[Any] = actor.options(
        name=name, namespace=NAMESPACE, get_if_exists=True, lifetime="detached"
    ).remote()
    return handle


def find_directory(name: str = SHARED_DIRECTORY) -> ActorHandle[Any]:
    """The directory of that name.

    Raises:
        ValueError: there is none in this Ray cluster.
    """
    return ray.get_actor(name, namespace=NAMESPACE)
