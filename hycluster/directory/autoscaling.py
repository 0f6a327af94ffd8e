"""How many replicas a pool is to have: up fast, down after a quiet time, to none only when nobody asks.

Pure: the load and what was decided before come in, a number and its reason come out. Who asks, and who does it:
``hycluster/directory/scaler.py``. Counts are of replicas as Ray Serve has them: a data-parallel group is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from hycluster.core import ReplicaLoad
from hycluster.settings.pool import Autoscaling, Replicas

# Replicas go only if those that stay would have at most this share of what a replica is to have: else the next small
# rise would bring them back.
FULL_ENOUGH = 0.8
# Without word of the load for so long, nothing that was seen before counts as lasting.
LAPSE_S = 5.0
# How long a start may take of which no other is known, until the pool may go down again without it.
UNKNOWN_START_S = 600.0


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """What a pool has to do.

    Attributes:
        gateways: how many have said what they want; with none of them, nothing is known.
        waiting_requests: that have no replica, or were told to come back.
        outstanding_tokens: to prefill or decode, of all requests, wherever they are.
        engines: what each last said of itself; of a group there are several.
        cold_start_s: how long a start took, if that is known.
    """

    gateways: int = 0
    waiting_requests: int = 0
    outstanding_tokens: int = 0
    engines: tuple[ReplicaLoad, ...] = ()
    cold_start_s: float | None = None

    @property
    def idle(self) -> bool:
        """Nobody wants anything. Engines have work at times that nobody asked for: their health is tried."""
        return not self.waiting_requests and not self.outstanding_tokens


@dataclass(frozen=True, slots=True)
class Memory:
    """What a decision hands on to the next one. Times are seconds of any one clock.

    Attributes:
        seen_s: when the load was last known.
        short_since_s: since when more replicas have been wanted; ``short_by`` is the least that was.
        quiet_since_s: since when fewer have been enough; ``quiet_need`` is the most that was needed.
        idle_since_s: since when nobody has asked.
        raised_s: when the target last went up.
    """

    seen_s: float = -math.inf
    short_since_s: float | None = None
    short_by: int = 0
    quiet_since_s: float | None = None
    quiet_need: int = 0
    idle_since_s: float | None = None
    raised_s: float = -math.inf


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there are to be.

    Attributes:
        reason: why the number has changed, in words; empty if it has not.
        cause: the same as one of a few words, for metrics.
    """

    target: int
    memory: Memory
    reason: str = ""
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Scaling:
    """What a pool's scaler tells the others.

    Attributes:
        target: replicas that there are to be.
        running: replicas that Ray Serve has started.
        starting_for_s: how long the oldest start has taken so far; None while none is wanted.
        cold_start_s: how long the last start took, from the decision on.
        decisions: by cause, how often the target has changed.
    """

    target: int
    running: int
    starting_for_s: float | None = None
    cold_start_s: float | None = None
    decisions: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Need:
    """Replicas that a load asks for, as a fraction, and by which of its measures."""

    replicas: float
    cause: str
    words: str


def needed(load: PoolLoad, rules: Autoscaling, ranks: int) -> Need:
    """Replicas that the load asks for: by the measure that asks for most.

    Args:
        ranks: engines of one replica.
    """
    if load.idle:
        return Need(0.0, "idle", "nobody asks")
    tokens = load.outstanding_tokens
    kv_usage = sum(engine.kv_usage for engine in load.engines) / ranks
    sequences = sum(engine.running + engine.waiting for engine in load.engines)
    batches = sum((e.running + e.waiting) / e.most_running for e in load.engines if e.most_running) / ranks
    return max(
        Need(tokens / rules.target_outstanding_tokens, "tokens", f"{tokens} tokens are outstanding"),
        Need(kv_usage / rules.target_kv_usage, "kv_cache", f"KV caches of {kv_usage:.1f} replicas are in use"),
        Need(batches / rules.target_batch_usage, "queue", f"{sequences} sequences run or wait"),
        key=lambda need: need.replicas,
    )


def decide(
    load: PoolLoad,
    *,
    target: int,
    running: int,
    replicas: Replicas,
    rules: Autoscaling,
    ranks: int = 1,
    memory: Memory,
    now_s: float,
) -> Decision:
    """How many replicas there are to be from now on.

    Args:
        target: how many there were to be until now.
        running: how many of them have started.
        ranks: engines of one replica.
        now_s: never less than at the decision that ``memory`` comes from.
    """
    if not load.gateways:
        return Decision(_within(target, replicas), memory)
    if now_s - memory.seen_s > LAPSE_S:
        memory = replace(Memory(), raised_s=memory.raised_s)
    memory = replace(memory, seen_s=now_s)
    if target != _within(target, replicas):
        return _changed(_within(target, replicas), target, memory, "is outside of the bounds", "bounds", now_s)
    need = needed(load, rules, ranks)
    wanted = _within(0 if load.idle else max(1, math.ceil(need.replicas)), replicas)
    if wanted > target:
        memory = replace(memory, quiet_since_s=None, idle_since_s=None)
        return _up(load, need, target, wanted, rules, memory, now_s)
    memory = replace(memory, short_since_s=None)
    # One is kept until nobody has asked for a while.
    enough = _within(max(math.ceil(need.replicas / FULL_ENOUGH), 1), replicas)
    return _down(load, min(enough, target), target, running, replicas, rules, memory, now_s)


def _up(
    load: PoolLoad, need: Need, target: int, wanted: int, rules: Autoscaling, memory: Memory, now_s: float
) -> Decision:
    if target == 0:
        waiting = load.waiting_requests
        words = f"{waiting} request{'s wait' if waiting > 1 else ' waits'}" if waiting else need.words
        return _changed(wanted, target, memory, words, "wake", now_s)
    since = now_s if memory.short_since_s is None else memory.short_since_s
    # A peak that has passed already is none that lasts.
    least = wanted if memory.short_since_s is None else min(memory.short_by, wanted)
    if now_s - since >= rules.scale_up_after_s:
        return _changed(least, target, memory, need.words, need.cause, now_s)
    return Decision(target, replace(memory, short_since_s=since, short_by=least))


def _down(
    load: PoolLoad,
    enough: int,
    target: int,
    running: int,
    replicas: Replicas,
    rules: Autoscaling,
    memory: Memory,
    now_s: float,
) -> Decision:
    quiet_s = max(rules.scale_down_after_s, load.cold_start_s or 0.0)
    # What was started for somebody is there for a while before it goes again.
    patience_s = UNKNOWN_START_S if load.cold_start_s is None else 2 * load.cold_start_s
    starting = running < target and now_s - memory.raised_s < patience_s
    idle = load.idle and target > 0 and replicas.min == 0 and not starting
    quiet = 0 < enough < target
    idle_since = (now_s if memory.idle_since_s is None else memory.idle_since_s) if idle else None
    quiet_since = (now_s if memory.quiet_since_s is None else memory.quiet_since_s) if quiet else None
    most = enough if memory.quiet_since_s is None else max(memory.quiet_need, enough)
    memory = replace(memory, idle_since_s=idle_since, quiet_since_s=quiet_since, quiet_need=most)
    if idle_since is not None and now_s - idle_since >= rules.scale_to_zero_after_s:
        return _changed(0, target, memory, f"nobody has asked for {now_s - idle_since:.0f} s", "idle", now_s)
    if quiet_since is not None and now_s - quiet_since >= quiet_s:
        return _changed(most, target, memory, f"so many were enough for {now_s - quiet_since:.0f} s", "quiet", now_s)
    return Decision(target, memory)


def _changed(to: int, target: int, memory: Memory, words: str, cause: str, now_s: float) -> Decision:
    raised_s = now_s if to > target else memory.raised_s
    # What has been idle stays so: the last replica need not wait for its time anew.
    idle_since = memory.idle_since_s if to < target else None
    return Decision(to, Memory(seen_s=now_s, idle_since_s=idle_since, raised_s=raised_s), words, cause)


def _within(count: int, replicas: Replicas) -> int:
    return min(max(count, replicas.min), replicas.most)
