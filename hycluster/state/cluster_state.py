"""The state of the cluster, as it is told to people and to scripts: ``GET /hycluster/status``, the page, the commands.

Made of what the directory knows and of the batches in the store. Pure. It holds names, counts and reasons; nothing of a
model's settings, which may have keys in them, and nothing of what was asked or answered.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from hycluster.core import EngineSample
from hycluster.directory.directory import PoolView, ReplicaReport, Survey
from hycluster.directory.faults import ReplicaFault
from hycluster.directory.starts import StartingReplica
from hycluster.pool_health import PoolHealth, able
from hycluster.settings.objectives import Objectives
from hycluster.state.traffic_state import TrafficState, traffic_state
from hycluster.traffic import together

# Tokens that the KV cache was asked for, and those that it had: what the dashboards show too.
PREFIX_QUERIES, PREFIX_HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"

Standing = Literal["ready", "degraded", "starting", "unavailable"]
PoolStanding = Literal["ready", "degraded", "starting", "asleep", "unavailable"]


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """An engine that has started; a data-parallel group has several.

    Attributes:
        host: where gateways reach it.
        group: of a data-parallel group, its name; else null.
        draining: it takes nothing new.
        lost: an ingress process has lost it; the directory has not missed it yet.
        running, waiting: sequences in its batch, and in its queue.
        most_running: sequences that a batch holds at most; 0 if that is not known.
        kv_usage: share of its KV cache in use, 0 to 1.
        outstanding_tokens: left to prefill or decode, for all ingress processes.
        step_s: duration of its last step; null where the engine does not say.
        prefix_hit_rate: share of the prompts' tokens that it had in its KV cache, since it started, by vLLM's own count
            of it; null before the first prompt, and where the engine does not say.
        batch_rows, batch_rows_parked: bulk rows that have a slot, and those of them that got no token in the last step.
    """

    id: str
    host: str
    group: str | None
    draining: bool
    lost: bool
    running: int
    waiting: int
    most_running: int
    kv_usage: float
    outstanding_tokens: int
    step_s: float | None
    prefix_hit_rate: float | None
    batch_rows: int
    batch_rows_parked: int


@dataclass(frozen=True, slots=True)
class JobState:
    """A job's rows in a pool's engines, by all gateways.

    Attributes:
        job: name of a bulk job and its output, or id of a batch.
        rows: places that it has in the engines.
        more: it wants more of them.
        urgent_at: the deadline that it would miss at its pace, in seconds since the epoch; null if it is not late.
    """

    job: str
    rows: int
    more: bool
    urgent_at: float | None


@dataclass(frozen=True, slots=True)
class PoolState:
    """One model's replicas.

    Attributes:
        why: in words, what keeps it from being ready; empty if nothing does.
        retry_in_s: when the next start begins after failed ones; null if none failed.
        scaling: how often the autoscaler has changed the number wanted, by cause; null where the number is fixed.
        starting: the replicas that are not ready yet.
    """

    model: str
    state: PoolStanding
    replicas_ready: int
    replicas_wanted: int
    why: str
    retry_in_s: float | None
    scaling: Mapping[str, int] | None
    adapters: tuple[str, ...]
    replicas: tuple[ReplicaState, ...]
    starting: tuple[StartingReplica, ...]
    jobs: tuple[JobState, ...]


@dataclass(frozen=True, slots=True)
class BatchState:
    """A batch of the Batch API.

    Attributes:
        deadline: end of its completion window, in seconds since the epoch.
        why: what it waits for, or why it failed; empty if there is nothing to say.
    """

    id: str
    endpoint: str
    model: str | None
    status: str
    total: int
    completed: int
    failed: int
    created_at: int
    deadline: int
    ended_at: int | None
    why: str


@dataclass(frozen=True, slots=True)
class ClusterState:
    """All of it, at one moment.

    Attributes:
        at: seconds since the epoch.
        version: of hycluster.
        problems: in words, a line each: what keeps the state from being ``ready``.
        ingresses: where the gRPC ingress of each node's ingress processes is reached within the cluster.
        traffic: of the last hour, over all models.
        batches: the newest first; null where there is no Batch API.
        faults: replicas that were lost or did not start, the newest first.
    """

    at: float
    version: str
    state: Standing
    problems: tuple[str, ...]
    pools: tuple[PoolState, ...]
    ingresses: tuple[str, ...]
    traffic: TrafficState
    batches: tuple[BatchState, ...] | None
    faults: tuple[ReplicaFault, ...] = ()
    traffic_by_model: Mapping[str, TrafficState] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)


def cluster_state(
    survey: Survey,
    pools: Mapping[str, PoolHealth],
    *,
    version: str,
    open_here: bool = True,
    batches: Iterable[BatchState] | None = None,
    objectives: Objectives = Objectives(),  # noqa: B008 - it can't change
    now: float | None = None,
) -> ClusterState:
    """What the directory knows, as it is told.

    Args:
        pools: by model, in the settings' order, what the ingress process says of its replicas.
        open_here: an ingress process can serve.
        objectives: by which traffic is judged.
        now: seconds since the epoch; None is now.
    """
    now = time.time() if now is None else now
    counted = {model: together(survey.traffic.get(model, ())) for model in pools}
    states = tuple(
        _pool(survey, survey.pools.get(model, PoolView(None, [])), model, health) for model, health in pools.items()
    )
    if not open_here:
        standing: Standing = "starting"
    elif not able(pools):
        standing = "unavailable"
    else:
        standing = "ready" if all(pool.state in ("ready", "asleep") for pool in states) else "degraded"
    return ClusterState(
        now,
        version,
        standing,
        tuple(f"{pool.model}: {pool.why}" for pool in states if pool.why and pool.state != "asleep"),
        states,
        tuple(sorted(report.grpc for report in survey.ingresses)),
        traffic_state(together(counted.values()), now, objectives.answered_ratio),
        None if batches is None else tuple(batches),
        tuple(survey.faults),
        {model: traffic_state(each, now, objectives.answered_ratio) for model, each in counted.items()},
    )


def health_of(survey: Survey) -> dict[str, PoolHealth]:
    """By model, what the directory alone says of it, where no ingress process answers."""
    found: dict[str, PoolHealth] = {}
    for model, view in sorted(survey.pools.items()):
        wanted = view.scaling.target if view.scaling else view.model.replicas.count if view.model else 0
        sleeps = view.model.sleeps if view.model else False
        found[model] = PoolHealth(survey.overview.ready.get(model, 0), wanted, sleeps, view.trouble)
    return found


def _pool(survey: Survey, view: PoolView, model: str, health: PoolHealth) -> PoolState:
    starting = survey.overview.starting.get(model, ())
    known = survey.overview.ready.get(model, health.replicas_ready)
    # A replica that is killed is lost to the ingress process at once, and to the directory some seconds later.
    ready = min(known, health.replicas_ready)
    draining = len({report.group or report.address.replica_id for report in view.replicas if not report.accepting})
    wanted = view.scaling.target if view.scaling else health.replicas_wanted
    asleep = model in survey.overview.asleep and not ready
    state: PoolStanding
    if asleep:
        state = "asleep"
    elif ready >= wanted and ready and not health.cut_off and health.trouble is None:
        state = "ready"
    elif ready and not health.cut_off:
        state = "degraded"
    else:
        state = "starting" if starting and health.trouble is None else "unavailable"
    return PoolState(
        model,
        state,
        ready,
        wanted,
        _why(state, health, ready, wanted, starting, lost=known - ready, draining=draining),
        health.trouble.retry_in_s if health.trouble else None,
        dict(view.scaling.decisions) if view.scaling else None,
        tuple(sorted(name for name, entry in view.adapters.items() if entry.source is not None)),
        tuple(_replica(report, health) for report in sorted(view.replicas, key=lambda each: each.address.replica_id)),
        starting,
        _jobs(view),
    )


def _why(
    state: PoolStanding,
    health: PoolHealth,
    ready: int,
    wanted: int,
    starting: Sequence[StartingReplica],
    *,
    lost: int,
    draining: int,
) -> str:
    if state == "asleep":
        return "sleeps; a request wakes it"
    if state == "ready" and health.trouble is None:
        return ""
    parts = [f"{ready} of {wanted} replicas serve"]
    if health.cut_off:
        parts.append("this ingress process reaches none of them")
    if lost and not health.cut_off:
        parts.append(f"{lost} lost just now")
    if draining:
        parts.append(f"{draining} draining")
    if health.trouble:
        parts.append(health.trouble.told())
    elif starting:
        stages = sorted({each.stage for each in starting})
        parts.append(f"{len(starting)} starting ({', '.join(stages)})")
    elif ready + lost + draining < wanted:
        parts.append("the others have not begun to start: their processes wait for a node with room, or for Ray Serve")
    return "; ".join(parts)


def _replica(report: ReplicaReport, health: PoolHealth) -> ReplicaState:
    load, colocation = report.load, report.load.colocation
    asked, had = (_sum(load.samples, name) for name in (PREFIX_QUERIES, PREFIX_HITS))
    return ReplicaState(
        report.address.replica_id,
        urlsplit(report.address.requests).hostname or "",
        report.group,
        not report.accepting,
        report.address.replica_id in health.lost,
        load.running,
        load.waiting,
        load.most_running,
        round(load.kv_usage, 4),
        sum(load.outstanding_tokens.values()),
        colocation.real_step_s or None if colocation else None,
        round(had / asked, 4) if asked else None,
        colocation.bulk_running if colocation else 0,
        colocation.parked if colocation else 0,
    )


def _sum(samples: Iterable[EngineSample], metric: str) -> float:
    return sum(value for name, _, value in samples if name == metric)


def _jobs(view: PoolView) -> tuple[JobState, ...]:
    found: dict[str, JobState] = {}
    for jobs in view.bulk.values():
        for name, demand in jobs.items():
            before = found.get(name, JobState(name, 0, False, None))
            urgent = [at for at in (before.urgent_at, demand.urgent_at) if at is not None]
            found[name] = JobState(
                name, before.rows + demand.rows, before.more or demand.more, min(urgent, default=None)
            )
    return tuple(found[name] for name in sorted(found))
