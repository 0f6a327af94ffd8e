"""Which replicas there are: one small Ray actor that replicas report to and gateways ask.

Who only looks calls ``view`` (one pool), ``overview`` or ``survey`` (all pools), ``models`` or ``find``; none of these
changes a thing.

All of its state is soft. Replicas report twice a second; one that has not for a while is dropped.
Losing the directory loses nothing: Ray starts it again, the next reports fill it, and gateways go on
with what they last heard.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle

from hycluster.adapters import AdapterEntry, AdapterTable
from hycluster.core import BulkDemand, GatewayWork, ReplicaAddress, ReplicaLoad
from hycluster.directory.autoscaling import PoolLoad, Scaling
from hycluster.directory.faults import FaultLog, ReplicaFault
from hycluster.directory.starts import StartingReplica, Starts
from hycluster.limits.book import LeaseAnswer, LeaseAsk, LeaseBook, Name
from hycluster.pool_health import StartTrouble
from hycluster.settings.model import Model
from hycluster.traffic import KEEP_MINUTES, ModelTraffic

NAMESPACE = "hycluster"
SHARED_DIRECTORY = "hycluster-directory"
REPORT_EVERY_S = 0.5
FORGET_AFTER_S = 10.0
# How long a question about requests is put to gateways, each of which comes by twice a second; and how many at a time.
ASKED_FOR_S = 2.0
MOST_QUESTIONS = 64


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a replica says of itself: where it is, what it does, and whether it takes new requests.

    Attributes:
        group: name of the data-parallel group that it is a rank of; None for a replica of one engine.
    """

    address: ReplicaAddress
    load: ReplicaLoad
    accepting: bool = True
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Demand:
    """What a gateway wants of a pool that follows its load.

    Attributes:
        model: its settings; no replica says them while the pool sleeps.
        waiting_requests: that have no replica, or were told to come back.
        outstanding_tokens: to prefill or decode, of all its requests, those that wait among them.
        cold_start_s: what it has heard of the last start.
    """

    model: Model
    waiting_requests: int = 0
    outstanding_tokens: int = 0
    cold_start_s: float | None = None


@dataclass(frozen=True, slots=True)
class PoolView:
    """What there is to know of one model's pool. Loads carry the outstanding tokens of all gateways.

    Attributes:
        bulk: by gateway, what each of its jobs has and wants.
        scaling: what its scaler last decided; None if it has said nothing, or the pool's size is fixed.
        trouble: why replicas do not start, if they don't.
        shown_by: of the gateways that show metrics the one that shows what concerns the pool: the one that is here
            longest, so that it rarely changes.
        questions: what somebody wants to know of the requests that the gateway's process has carried out; see
            :meth:`Directory.ask`.
    """

    model: Model | None
    replicas: list[ReplicaReport]
    adapters: dict[str, AdapterEntry] = field(default_factory=dict)
    scaling: Scaling | None = None
    trouble: StartTrouble | None = None
    bulk: dict[str, dict[str, BulkDemand]] = field(default_factory=dict)
    shown_by: str | None = None
    questions: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Overview:
    """What one looks at to know how a service is.

    Attributes:
        pid: of the directory's process.
        ready: by model, how many replicas take requests; a group counts as one.
        troubles: by model, why replicas do not start.
        asleep: models that are to have no replica now.
        unreached: models of which replicas take requests, but not every gateway is connected to one yet.
        starting: by model, the replicas that are not ready yet.
    """

    pid: int = 0
    ready: dict[str, int] = field(default_factory=dict)
    troubles: dict[str, StartTrouble] = field(default_factory=dict)
    asleep: frozenset[str] = frozenset()
    unreached: frozenset[str] = frozenset()
    starting: dict[str, tuple[StartingReplica, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IngressReport:
    """Where an ingress process is reached from within the cluster.

    Attributes:
        node: Ray's id of its node.
        grpc: ``host:port`` of its gRPC ingress.
        everywhere: from other nodes too.
    """

    node: str
    grpc: str
    everywhere: bool


@dataclass(frozen=True, slots=True)
class Survey:
    """All that the directory knows, for whoever looks at the cluster; see ``hycluster/state``.

    Attributes:
        pools: by model.
        traffic: by model, what each ingress process has counted over the last hour.
        faults: the newest first.
    """

    overview: Overview = field(default_factory=Overview)
    pools: dict[str, PoolView] = field(default_factory=dict)
    ingresses: list[IngressReport] = field(default_factory=list)
    traffic: dict[str, list[ModelTraffic]] = field(default_factory=dict)
    faults: list[ReplicaFault] = field(default_factory=list)


Words = TypeVar("Words")
# When somebody said something, and what.
_Said = tuple[float, Words]


@dataclass(slots=True)
class _Pool:
    model: Model | None = None
    reports: dict[str, _Said[ReplicaReport]] = field(default_factory=dict)
    outstanding: dict[str, _Said[dict[str, int]]] = field(default_factory=dict)
    work: dict[str, _Said[dict[str, GatewayWork]]] = field(default_factory=dict)
    adapters: AdapterTable = field(default_factory=AdapterTable)
    demands: dict[str, _Said[Demand]] = field(default_factory=dict)
    bulk: dict[str, _Said[dict[str, BulkDemand]]] = field(default_factory=dict)
    showing: dict[str, _Said[None]] = field(default_factory=dict)
    # When and how gateways lost those that have said nothing since.
    losses: dict[str, tuple[float, str]] = field(default_factory=dict)
    scaling: _Said[Scaling] | None = None
    starts: Starts = field(default_factory=Starts)


class Directory:
    """The actor's class; plain Python, so tests use it as it is."""

    def __init__(self) -> None:
        self._pools: dict[str, _Pool] = {}
        self._ingresses: dict[str, _Said[IngressReport]] = {}
        self._traffic: dict[str, _Said[dict[str, ModelTraffic]]] = {}
        self._faults = FaultLog()
        self._closing = False
        self._questions: dict[str, _Said[Any]] = {}
        self._answers: dict[str, list[Any]] = {}
        self._limits = LeaseBook()

    def report(self, model: Model, report: ReplicaReport) -> None:
        """A replica is there."""
        pool = self._pools.setdefault(model.name, _Pool())
        pool.model = model
        pool.adapters.merge(AdapterTable(model.adapters).words)
        if report.address.replica_id not in pool.reports:
            pool.starts.succeeded()
        pool.reports[report.address.replica_id] = (time.monotonic(), report)
        pool.losses.pop(report.address.replica_id, None)

    def begin_start(self, model: Model, replica: str) -> float:
        """A replica starts; returns the seconds that it is to wait first, as others of its model failed before it."""
        pool = self._pools.setdefault(model.name, _Pool())
        if pool.model is None:
            pool.model = model
            pool.adapters.merge(AdapterTable(model.adapters).words)
        return pool.starts.begin(replica, model.replicas.most)

    def close(self) -> None:
        """The service ends."""
        self._closing = True

    def closing(self) -> bool:
        """Whether starts that wait for their turn are to give up."""
        return self._closing

    def start_failed(self, model: Model, replica: str, kind: str, reason: str) -> None:
        """A replica could not start."""
        self._pools.setdefault(model.name, _Pool()).starts.failed(replica, model.replicas.count, kind, reason)
        self._faults.add(model.name, replica, f"did not start: {reason}")

    def start_stage(self, model: str, replica: str, stage: str) -> None:
        """A replica that starts has come to its next stage."""
        self._pools.setdefault(model, _Pool()).starts.stage(replica, stage)

    def start_ended(self, model: str, replica: str) -> None:
        """A replica has started."""
        self._pools.setdefault(model, _Pool()).starts.ended(replica)

    def leave(self, model: str, replica_id: str) -> None:
        """A replica has gone, in good order."""
        if model in self._pools:
            self._pools[model].reports.pop(replica_id, None)
            self._pools[model].losses.pop(replica_id, None)

    def sync(
        self,
        model: str,
        gateway_id: str,
        outstanding: dict[str, int],
        adapters: dict[str, AdapterEntry] | None = None,
        demand: Demand | None = None,
        bulk: dict[str, BulkDemand] | None = None,
        shows: bool = False,
        work: dict[str, GatewayWork] | None = None,
        losses: dict[str, str] | None = None,
    ) -> PoolView:
        """A gateway says what it has outstanding on each replica and which adapters it knows, and hears of the pool.

        Args:
            demand: None for a pool of fixed size.
            bulk: by job, what it has and wants of the pool by this gateway.
            shows: it shows metrics.
            work: by replica, what that has of this gateway's requests; None: it does not tell them apart.
            losses: by replica that is named here and not connected any more, how its connection ended.
        """
        now = time.monotonic()
        if demand is not None:
            self._want(gateway_id, demand, now)
        pool = self._pools.get(model)
        if pool is not None:
            pool.adapters.merge(adapters or {})
            pool.outstanding[gateway_id] = (now, outstanding)
            pool.outstanding = _recent(pool.outstanding, now)
            pool.work[gateway_id] = (now, work or {})
            pool.work = _recent(pool.work, now)
            pool.bulk[gateway_id] = (now, bulk or {})
            pool.bulk = _recent(pool.bulk, now)
            if shows:
                # One that has been silent for too long is the youngest when it comes back.
                pool.showing = _recent(pool.showing, now)
                pool.showing[gateway_id] = (now, None)
            for replica, why in (losses or {}).items():
                if replica in pool.reports:
                    pool.losses.setdefault(replica, (self._faults.now(), why))
            reports = _recent(pool.reports, now)
            for replica in pool.reports.keys() - reports.keys():
                # Another network's trouble may break a connection: only who says nothing any more is lost.
                at, why = pool.losses.pop(replica, (None, f"has said nothing for {FORGET_AFTER_S:.0f} s"))
                self._faults.add(model, replica, f"lost: {why}", at)
            pool.reports = reports
        questions = tuple(question for said, question in self._questions.values() if now - said < ASKED_FOR_S)
        view = self.view(model)
        return replace(view, questions=questions) if questions else view

    def ask(self, number: str, question: Any) -> None:
        """Ask every process that has a gateway: each hears of it at its next sync, and answers here.

        Ingress processes of one node share their ports, and a job's process has none: nobody else can reach them all.
        """
        now = time.monotonic()
        self._questions = _recent(self._questions, now)
        self._answers = {known: said for known, said in self._answers.items() if known in self._questions}
        if len(self._questions) < MOST_QUESTIONS:
            self._questions[number] = (now, question)
            self._answers[number] = []

    def answer(self, number: str, found: list[Any]) -> None:
        """One process' answer to a question."""
        if number in self._answers:
            self._answers[number].append(found)

    def answers(self, number: str) -> list[list[Any]]:
        """What has been answered so far, by each process that has; nothing to a question that was not taken."""
        return list(self._answers.get(number, []))

    def open_ingress(self, report: IngressReport) -> None:
        """An ingress process is open, and a request would succeed there."""
        now = time.monotonic()
        self._ingresses = _recent(self._ingresses, now)
        # Those of one node share their ports.
        self._ingresses[f"{report.node} {report.grpc}"] = (now, report)

    def ingresses(self) -> list[IngressReport]:
        """Those that have said so lately."""
        return [report for _, report in _recent(self._ingresses, time.monotonic()).values()]

    def tell_traffic(self, ingress: str, traffic: dict[str, ModelTraffic]) -> None:
        """What an ingress process has counted over the last hour, by model."""
        now = time.monotonic()
        self._traffic[ingress] = (now, traffic)
        # What one had counted that has ended since was asked all the same.
        self._traffic = {who: said for who, said in self._traffic.items() if now - said[0] < KEEP_MINUTES * 60}

    def lease(self, who: str, book: str, asks: dict[Name, LeaseAsk]) -> LeaseAnswer:
        """A process wants leases of limits; see :class:`hycluster.limits.book.LeaseBook`."""
        return self._limits.lease(who, book, asks)

    def limits_used(self) -> dict[Name, int]:
        """What is used now of limits that are no day's or month's."""
        return self._limits.used()

    def survey(self) -> Survey:
        """All that is known, for whoever looks."""
        traffic: dict[str, list[ModelTraffic]] = {}
        for _, counted in self._traffic.values():
            for model, counts in counted.items():
                traffic.setdefault(model, []).append(counts)
        pools = {model: self.view(model) for model in self._pools}
        return Survey(self.overview(), pools, self.ingresses(), traffic, self._faults.newest_first)

    def view(self, model: str) -> PoolView:
        """What is known of a model's pool, for whoever asks: looking changes nothing."""
        now = time.monotonic()
        pool = self._pools.get(model)
        if pool is None:
            return PoolView(None, [])
        outstanding, work = _recent(pool.outstanding, now), _recent(pool.work, now)
        reports = [_of_gateways(report, outstanding, work) for _, report in _recent(pool.reports, now).values()]
        scaling = pool.scaling[1] if pool.scaling and _is_recent(pool.scaling, now) else None
        bulk = {gateway: jobs for gateway, (_, jobs) in _recent(pool.bulk, now).items() if jobs}
        shown_by = next(iter(_recent(pool.showing, now)), None)
        return PoolView(pool.model, reports, pool.adapters.words, scaling, pool.starts.trouble, bulk, shown_by)

    def _want(self, gateway_id: str, demand: Demand, now: float) -> None:
        pool = self._pools.setdefault(demand.model.name, _Pool())
        if not pool.reports:
            pool.model = demand.model
            pool.adapters.merge(AdapterTable(demand.model.adapters).words)
        pool.demands[gateway_id] = (now, demand)

    def scale(self, model: str, scaling: Scaling) -> PoolLoad:
        """A pool's scaler says what it has decided, and hears what there is to do."""
        now = time.monotonic()
        pool = self._pools.setdefault(model, _Pool())
        pool.scaling = (now, scaling)
        pool.demands = _recent(pool.demands, now)
        demands = [demand for _, demand in pool.demands.values()]
        reports = [report for _, report in _recent(pool.reports, now).values()]
        return PoolLoad(
            gateways=len(demands),
            waiting_requests=sum(demand.waiting_requests for demand in demands),
            outstanding_tokens=sum(demand.outstanding_tokens for demand in demands),
            engines=tuple(report.load for report in reports),
            cold_start_s=next((demand.cold_start_s for demand in demands if demand.cold_start_s is not None), None),
        )

    def find(self, name: str) -> Model | None:
        """The model of that name, or the one that has an adapter of that name."""
        for model, pool in self._pools.items():
            if name == model or name in pool.adapters.sources:
                return pool.model
        return None

    def models(self) -> dict[str, int]:
        """Names of models and adapters, and how many replicas of each take requests; a group counts as one."""
        ready = self._ready()
        return ready | {adapter: ready[name] for name, pool in self._pools.items() for adapter in pool.adapters.sources}

    def overview(self) -> Overview:
        """How all pools are."""
        now = time.monotonic()
        return Overview(
            os.getpid(),
            self._ready(),
            {name: trouble for name, pool in self._pools.items() if (trouble := pool.starts.trouble)},
            frozenset(
                name
                for name, pool in self._pools.items()
                if pool.scaling and _is_recent(pool.scaling, now) and pool.scaling[1].target == 0
            ),
            frozenset(name for name, pool in self._pools.items() if _is_unreached(pool, now)),
            {name: starting for name, pool in self._pools.items() if (starting := pool.starts.starting)},
        )

    def _ready(self) -> dict[str, int]:
        now = time.monotonic()
        return {
            name: len({report.group or report.address.replica_id for report in _accepting(pool, now)})
            for name, pool in self._pools.items()
        }


def _accepting(pool: _Pool, now: float) -> list[ReplicaReport]:
    return [report for _, report in _recent(pool.reports, now).values() if report.accepting]


def _is_unreached(pool: _Pool, now: float) -> bool:
    accepting = {report.address.replica_id for report in _accepting(pool, now)}
    # A gateway says what it has on each replica that it is connected to.
    connected = [said.keys() for _, said in _recent(pool.outstanding, now).values()]
    return bool(accepting) and not (connected and all(accepting & of_one for of_one in connected))


def _is_recent(said: _Said[Any], now: float) -> bool:
    return now - said[0] < FORGET_AFTER_S


def _recent(said: dict[str, _Said[Words]], now: float) -> dict[str, _Said[Words]]:
    """Without those who have been silent for too long."""
    return {who: words for who, words in said.items() if _is_recent(words, now)}


def _of_gateways(
    report: ReplicaReport, outstanding: dict[str, _Said[dict[str, int]]], work: dict[str, _Said[dict[str, GatewayWork]]]
) -> ReplicaReport:
    """With what gateways say that they have there."""
    replica_id = report.address.replica_id
    tokens = {gateway: said.get(replica_id, 0) for gateway, (_, said) in outstanding.items()}
    apart = {gateway: said[replica_id] for gateway, (_, said) in work.items() if replica_id in said}
    return replace(report, load=replace(report.load, outstanding_tokens=tokens, work=apart))


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
