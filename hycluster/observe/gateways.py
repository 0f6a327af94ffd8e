"""What gateways know of their pools and did with their requests, under ``/metrics``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

from hycluster.core import ReplicaLoad
from hycluster.errors import KillsReplicas, ReplicaLost, RequestFailed, Unavailable
from hycluster.observe.catalogue import (
    CANCELLED,
    CONNECTED,
    FAILED,
    FAILED_STARTS,
    IN_FLIGHT,
    INGRESS,
    LOST,
    OUTSTANDING,
    READY,
    REFUSED,
    ROUTED,
    SILENT,
    WANTED,
)
from hycluster.observe.watched import Watching
from hycluster.pool_health import PoolHealth
from hycluster.traffic import GatewayTraffic, Refusal

# Series that would begin with their first event are there from the start: a query over nothing says nothing.
REFUSALS: tuple[str, ...] = get_args(Refusal)
FAILURES = tuple(error.__name__ for error in (ReplicaLost, KillsReplicas, RequestFailed, Unavailable))


@dataclass(slots=True)
class KnownReplica:
    """A replica that a gateway is connected to, or was a while ago: what it counted stays to be scraped.

    Attributes:
        number: unique in its gateway.
        routed: requests sent to it.
        gone: its connection has ended.
        why: of what, as was seen; empty where that was nobody's loss.
        last: what it had reported by then.
    """

    number: int
    replica_id: str
    routed: int = 0
    gone: bool = False
    why: str = ""
    last: ReplicaLoad | None = None

    def source(self, *, bulk: bool) -> int:
        """By what its outputs are told apart where they are counted, those of batch work from others."""
        return 2 * self.number + bulk


def is_batch_source(source: int) -> bool:
    """Whether a :meth:`KnownReplica.source` is of batch work."""
    return source % 2 == 1


@dataclass(frozen=True, slots=True)
class ReplicaBooks:
    """A gateway's books on one replica, now.

    Attributes:
        silent_s: since its last word, while it has requests; else 0.
    """

    replica_id: str
    requests: int
    outstanding_tokens: int
    silent_s: float


class WatchedPool(Protocol):
    """A gateway's side of its pool.

    Attributes:
        shows_pool: this process shows what concerns the pool; else another one does.
    """

    shows_pool: bool

    @property
    def replicas_lost(self) -> int:
        """Connections that ended while their replicas took requests."""

    @property
    def known(self) -> Collection[KnownReplica]:
        """Replicas that are connected, and the last ones that were."""

    @property
    def books(self) -> Sequence[ReplicaBooks]:
        """Of those that are connected."""


class WatchedGateway(Protocol):
    """One model's gateway.

    Attributes:
        traffic: what became of its requests.
    """

    traffic: GatewayTraffic

    @property
    def engine_core(self) -> WatchedPool: ...

    @property
    def health(self) -> PoolHealth: ...


class GatewayMetrics(Watching[WatchedGateway]):
    """Of all models."""

    def collect(self) -> Iterable[Metric]:
        refused, failed, routed, lost = REFUSED.counter(), FAILED.counter(), ROUTED.counter(), LOST.counter()
        cancelled = CANCELLED.counter()
        connected, silent = CONNECTED.gauge(), SILENT.gauge()
        in_flight, outstanding = IN_FLIGHT.gauge(), OUTSTANDING.gauge()
        ready, wanted, failed_starts = READY.gauge(), WANTED.gauge(), FAILED_STARTS.gauge()
        for model, gateway in self.sources:
            pool = gateway.engine_core
            for priority, traffic in (("online", gateway.traffic.online), ("batch", gateway.traffic.batch)):
                for counts, family, reasons in (
                    (traffic.refused, refused, REFUSALS), (traffic.failed, failed, FAILURES)
                ):  # fmt: skip
                    for reason in {*reasons, *counts}:
                        family.add_metric([model, reason, priority, INGRESS], counts[reason])
                cancelled.add_metric([model, priority, INGRESS], traffic.cancelled)
            lost.add_metric([model, INGRESS], pool.replicas_lost)
            connected.add_metric([model, INGRESS], len(pool.books))
            for known in pool.known:
                routed.add_metric([model, known.replica_id, INGRESS], known.routed)
            for book in pool.books:
                labels = [model, book.replica_id, INGRESS]
                in_flight.add_metric(labels, book.requests)
                outstanding.add_metric(labels, book.outstanding_tokens)
                silent.add_metric(labels, book.silent_s)
            if pool.shows_pool:
                health = gateway.health
                ready.add_metric([model], health.replicas_ready)
                wanted.add_metric([model], health.replicas_wanted)
                failed_starts.add_metric([model], health.trouble.failures if health.trouble else 0)
        families = (
            refused, failed, cancelled, routed, lost, connected, silent, in_flight, outstanding, ready, wanted,
            failed_starts,
        )  # fmt: skip
        return [family for family in families if family.samples]


gateway_metrics = GatewayMetrics()
REGISTRY.register(gateway_metrics)
