"""What there is to hit: this application's processes, on whatever node, and the signals that reach them.

Ray's own table of actors says which processes there are, also while one is stopped and could not answer; signals are
sent by a small actor on each node. Only processes of the Serve application ``hycluster`` are ever found, and a process
is hit only if it is still the one that was found.

Pinned to Ray 2.60.0: ``ray._private.state.actors`` and Serve's names of its actors (``SERVE_REPLICA::app#name#id``) are
private. The state API that is public needs the dashboard, which a cluster of ``hycluster serve`` does without.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray._private import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hycluster.app import APP_NAME
from hycluster.chaos.schedule import Where

_SERVE_NAME = f"SERVE_REPLICA::{APP_NAME}#"
_RANKS = "OtherRank"
# A batch job's process that holds a gateway (hycluster/batch/generate.py), as Ray Data names it.
_READERS = "(Generate)"
# As vLLM titles its tensor and pipeline workers.
_WORKERS = "VLLM::Worker"
ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class TargetProcess:
    """A process of the cluster. ``begun_s`` tells it from a later one of the same number."""

    node_id: str
    pid: int
    begun_s: float
    role: str


@dataclass(frozen=True, slots=True)
class Target:
    """An actor of the application that can be hit. ``ranks`` are the actors that live and die with it."""

    where: Where
    name: str
    actor_id: str
    node_id: str
    pid: int
    ranks: tuple[tuple[str, int], ...] = ()


class Hand:
    """Run as a Ray actor on a node: looks at its processes and sends them signals."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id

    def processes(self, pid: int, role: str) -> list[TargetProcess]:
        """A process and the tensor and pipeline workers below it; none if it has gone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            workers = [p for p in process.children(recursive=True) if " ".join(p.cmdline()).startswith(_WORKERS)]
            return [
                TargetProcess(self._node_id, p.pid, p.create_time(), "worker" if p in workers else role)
                for p in (process, *workers)
            ]
        return []

    def send(self, process: TargetProcess, number: int, resume_after_s: float | None = None) -> bool:
        """Send a signal, and SIGCONT after a while if that is wished; False if the process has gone before."""
        if not self._is_there(process):
            return False
        os.kill(process.pid, number)
        if resume_after_s is not None:
            time.sleep(resume_after_s)
            if self._is_there(process):
                os.kill(process.pid, signal.SIGCONT)
        return True

    @staticmethod
    def _is_there(process: TargetProcess) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(process.pid).create_time() == process.begun_s
        return False

    def listens(self, pid: int, ports: Sequence[int]) -> bool:
        """Whether the process listens on all of these ports."""
        with contextlib.suppress(psutil.NoSuchProcess):
            there = psutil.Process(pid).net_connections("inet")
            return set(ports) <= {c.laddr.port for c in there if c.status == psutil.CONN_LISTEN}
        return False


class Targets:
    """The application's processes. Call from one thread.

    Args:
        deployment: Serve's name of the model's deployment whose replicas may be hit.
    """

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment
        self._hands: dict[str, Any] = {}

    def hand(self, node_id: str) -> Any:
        """The actor on a node, started if there is none; it ends with this process."""
        if node_id not in self._hands:
            here = NodeAffinitySchedulingStrategy(node_id, soft=False)
            made: Any = ray.remote(Hand)
            # Several calls at once: one may be waiting to resume what it has stopped.
            options = made.options(num_cpus=0, max_concurrency=8, scheduling_strategy=here)
            self._hands[node_id] = options.remote(node_id)
        return self._hands[node_id]

    def find(self, where: Where) -> list[Target]:
        """What lives, the oldest first."""
        living = [actor for actor in state.actors().values() if actor["State"] == "ALIVE"]
        found = [(actor["StartTime"], actor["ActorID"], actor) for actor in living if self._place(actor) is where]
        return [self._target(actor, where, living) for _, _, actor in sorted(found, key=lambda one: one[:2])]

    def _place(self, actor: dict[str, Any]) -> Where | None:
        name = actor["Name"] or ""
        if name.startswith(_SERVE_NAME):
            deployment = name.removeprefix(_SERVE_NAME).partition("#")[0]
            return {self._deployment: Where.REPLICA, "ingress": Where.INGRESS, "batches": Where.BATCH}.get(deployment)
        return Where.BATCH if _READERS in actor["ActorClassName"] else None

    @staticmethod
    def _target(actor: dict[str, Any], where: Where, living: list[dict[str, Any]]) -> Target:
        def address(of: dict[str, Any]) -> tuple[str, int]:
            return of["IPAddress"], of["Port"]

        ranks = [
            (other["Address"]["NodeID"], other["Pid"])
            for other in living
            if other["ActorClassName"] == _RANKS and address(other["OwnerAddress"]) == address(actor["Address"])
        ]
        name = (actor["Name"] or actor["ActorClassName"]).removeprefix(_SERVE_NAME)
        return Target(where, name, actor["ActorID"], actor["Address"]["NodeID"], actor["Pid"], tuple(sorted(ranks)))

    def lives(self, target: Target) -> bool:
        """Whether Ray has it among the living; a stopped process is."""
        actor = state.actors(target.actor_id)
        return bool(actor) and actor["State"] == "ALIVE"

    def processes(self, target: Target) -> list[TargetProcess]:
        """Its processes, its own first, then its ranks', each with the workers below it."""
        asked = [self.hand(target.node_id).processes.remote(target.pid, str(target.where))]
        asked += [self.hand(node).processes.remote(pid, "rank") for node, pid in target.ranks]
        found: list[list[TargetProcess]] = ray.get(asked, timeout=ANSWER_TIMEOUT_S)
        return [process for processes in found for process in processes]

    def send(self, processes: Sequence[TargetProcess], number: int, resume_after_s: float | None = None) -> list[bool]:
        """Send all of them a signal, at the same moment; see :meth:`Hand.send`."""
        sent = [self.hand(p.node_id).send.remote(p, number, resume_after_s) for p in processes]
        done: list[bool] = ray.get(sent, timeout=ANSWER_TIMEOUT_S + (resume_after_s or 0))
        return done

    def listening(self, ports: Sequence[int]) -> list[Target]:
        """The ingress processes that listen on these ports."""
        ingresses = self.find(Where.INGRESS)
        asked = [self.hand(ingress.node_id).listens.remote(ingress.pid, ports) for ingress in ingresses]
        answers: list[bool] = ray.get(asked, timeout=ANSWER_TIMEOUT_S)
        return [ingress for ingress, listens in zip(ingresses, answers, strict=True) if listens]

    def close(self) -> None:
        """End the actors."""
        for hand in self._hands.values():
            ray.kill(hand)
        self._hands.clear()
