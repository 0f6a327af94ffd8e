"""The state of the cluster at a terminal: ``hycluster status`` and ``hycluster top``."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hycluster.state.cluster_state import ClusterState, PoolState
from hycluster.state.traffic_state import BatchTraffic, TrafficState
from hycluster.state.words import clock, count, left_of, load_of, percent, progress_of, replicas_of, span
from hycluster.terminal import printable

COLOURS = {
    "ready": "green",
    "asleep": "blue",
    "starting": "yellow",
    "degraded": "yellow",
    "unavailable": "red",
}
FAULTS, BATCHES = 8, 10
_BARS = "▁▂▃▄▅▆▇█"


def standing(state: ClusterState) -> Text:
    """How it is, in a line."""
    ready = sum(pool.state in ("ready", "asleep") for pool in state.pools)
    return Text.assemble(
        (state.state, f"bold {COLOURS[state.state]}"),
        f"  {ready} of {len(state.pools)} pools well, ingress {', '.join(state.ingresses) or 'not open'},"
        f" hycluster {state.version}, {clock(state.at)}",
    )


def shown_state(state: ClusterState) -> RenderableType:
    """All of it."""
    parts: list[RenderableType] = [standing(state), Text(), _pools(state), *_reasons(state), *_traffic(state.traffic)]
    if state.batches:
        parts += [Text(), _batches(state)]
    if jobs := _jobs(state):
        parts += [Text(), jobs]
    if state.faults:
        parts += [Text(), _faults(state)]
    return Group(*parts)


def _cell(text: str, style: str = "") -> Text:
    return Text(printable(text), style)


def _pools(state: ClusterState) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("pool / replica", "state"):
        table.add_column(name, overflow="fold")
    for name in ("load", "KV", "tokens left", "prefix hits", "step"):
        table.add_column(name, justify="right")
    for pool in state.pools:
        table.add_row(
            _cell(pool.model, "bold"), Text.assemble((pool.state, COLOURS[pool.state]), f", {replicas_of(pool)}")
        )
        for replica in pool.replicas:
            table.add_row(
                _cell(f"  {replica.id[:8]} on {replica.host}"),
                Text("lost", "red") if replica.lost else "draining" if replica.draining else "serves",
                load_of(replica),
                percent(replica.kv_usage),
                count(replica.outstanding_tokens),
                percent(replica.prefix_hit_rate),
                span(replica.step_s),
            )
    return table


def _reasons(state: ClusterState) -> Iterator[Text]:
    for pool in state.pools:
        if pool.why and pool.state != "asleep":
            yield _cell(f"{pool.model}: {_why(pool)}", COLOURS[pool.state])
        for starting in pool.starting:
            stages = ", ".join(f"{stage.name} {span(stage.duration_s)}" for stage in starting.stages)
            yield _cell(f"{pool.model}: replica {starting.replica[:8]} starts: {stages}", "yellow")


def _why(pool: PoolState) -> str:
    return pool.why if pool.retry_in_s is None else f"{pool.why}; next try in {pool.retry_in_s:.0f} s"


def _colour(traffic: TrafficState) -> str:
    if traffic.answered_share is None:
        return "dim"
    return "green" if traffic.answered_share >= traffic.objective else "red"


def _traffic(traffic: TrafficState) -> Iterator[RenderableType]:
    yield Text()
    if traffic.asked:
        yield from _online(traffic)
    else:
        yield Text(f"last hour: no{' online' * bool(traffic.batch.asked)} requests", "dim")
    if traffic.batch.asked:
        yield Text(_batch_rows(traffic.batch))


def _batch_rows(batch: BatchTraffic) -> str:
    return (
        f"batch rows at ingresses  {count(batch.answered)} answered, {count(batch.failed)} failed,"
        f" {count(batch.deferred)} told to come back, {count(batch.cancelled)} left,"
        f" {count(batch.output_tokens)} tokens out"
    )


def _online(traffic: TrafficState) -> Iterator[RenderableType]:
    yield Text.assemble(
        ("last hour  ", "bold"),
        f"{count(traffic.asked)} requests, ",
        (f"{percent(traffic.answered_share, 2)} answered", _colour(traffic)),
        f" (to be {percent(traffic.objective, 1)}), {count(traffic.failed)} failed,"
        f" {count(traffic.unavailable)} found no replica, {count(traffic.shed)} shed, {count(traffic.cancelled)} left,"
        f" {count(traffic.output_tokens)} tokens out",
    )
    yield Text(
        f"first token  p50 {span(traffic.ttft_s.p50)}, p95 {span(traffic.ttft_s.p95)}, p99 {span(traffic.ttft_s.p99)};"
        f"  each further one  p50 {span(traffic.tpot_s.p50)}, p99 {span(traffic.tpot_s.p99)};"
        f"  prompts from cache {percent(traffic.cached_share)}"
    )
    yield Text(f"requests a minute  {_sparks([each.answered + each.unanswered for each in traffic.minutes])}")


def _sparks(values: list[int]) -> str:
    most = max(values)
    return "".join(" " if not value else _BARS[(len(_BARS) - 1) * value // most] for value in values)


def _batches(state: ClusterState) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("batch", "state", "progress", "window"):
        table.add_column(name, overflow="fold")
    for batch in (state.batches or ())[:BATCHES]:
        why = f" ({batch.why})" if batch.why else ""
        table.add_row(
            _cell(batch.id), _cell(f"{batch.status}{why}"), progress_of(batch), _cell(left_of(batch, state.at))
        )
    return table


def _jobs(state: ClusterState) -> Table | None:
    rows = [(pool.model, job) for pool in state.pools for job in pool.jobs]
    if not rows:
        return None
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("in the engines", "model", "rows"):
        table.add_column(name, overflow="fold")
    for model, job in rows:
        late = ", late" if job.urgent_at is not None else ""
        table.add_row(_cell(job.job), _cell(model), f"{count(job.rows)}{', wants more' if job.more else ''}{late}")
    return table


def _faults(state: ClusterState) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("last faults", "replica", "what"):
        table.add_column(name, overflow="fold")
    for fault in state.faults[:FAULTS]:
        table.add_row(clock(fault.at), _cell(f"{fault.model} {fault.replica[:8]}"), _cell(fault.what))
    return table
