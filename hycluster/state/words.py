"""Figures of the state in words, the same on the page and at a terminal."""

from __future__ import annotations

import time

from hycluster.state.cluster_state import BatchState, PoolState, ReplicaState


def span(seconds: float | None) -> str:
    """How long something is or takes, in two figures' worth: ``850 ms``, ``3.2 s``, ``4 min``, ``1 h 5 min``."""
    if seconds is None:
        return "-"
    if seconds < 0.0995:
        return f"{seconds * 1000:.2g} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min"
    hours, minutes = divmod(int(seconds // 60), 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"


def percent(share: float | None, digits: int = 0) -> str:
    if share is None:
        return "-"
    told = f"{100 * share:.{digits}f}"
    if share < 1 and float(told) == 100:
        # What is not all is not told as all.
        told = f"{100 - 10**-digits:.{digits}f}"
    return f"{told} %"


def count(number: float) -> str:
    """``950``, ``12,340``, ``1.2 M``."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,.0f}"


def clock(at: float) -> str:
    """A moment, in UTC, with its day if that is another one."""
    then, now = time.gmtime(at), time.gmtime()
    form = "%H:%M:%S" if then[:3] == now[:3] else "%Y-%m-%d %H:%M"
    return time.strftime(form, then) + " UTC"


def load_of(replica: ReplicaState) -> str:
    """What a replica does: ``4 of 32 running, 2 waiting``."""
    of = f" of {replica.most_running}" if replica.most_running else ""
    waiting = f", {count(replica.waiting)} waiting" if replica.waiting else ""
    return f"{replica.running}{of} running{waiting}"


def replicas_of(pool: PoolState) -> str:
    return f"{pool.replicas_ready} of {pool.replicas_wanted} replicas"


def progress_of(batch: BatchState) -> str:
    failed = f", {count(batch.failed)} failed" if batch.failed else ""
    return f"{count(batch.completed + batch.failed)} of {count(batch.total)} requests{failed}"


def left_of(batch: BatchState, now: float) -> str:
    """Of a batch that runs, the time until its window ends; of one that has ended, how long it took."""
    if batch.ended_at is not None:
        return f"took {span(batch.ended_at - batch.created_at)}"
    left_s = batch.deadline - now
    return f"{span(left_s)} left" if left_s >= 0 else f"{span(-left_s)} over its window"
