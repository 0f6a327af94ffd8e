"""One engine and what goes with it: its sockets, its reports to the directory, its health, its drain.

A replica has one, or one a rank of its data-parallel group (``hycluster/replica/group.py``).
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import ray

from hycluster.core import ReplicaAddress
from hycluster.directory.directory import FORGET_AFTER_S, REPORT_EVERY_S, ReplicaReport, open_directory
from hycluster.engine.arguments import model_files
from hycluster.engine.protocol import Engine, GroupRank
from hycluster.imports import without_collector
from hycluster.memory import MemoryGuard, bound_bytes
from hycluster.replica.engine_health import EngineHealth
from hycluster.replica.sparing_log import SparingLog
from hycluster.replica.wire import EngineServer
from hycluster.settings.load import DataPlane
from hycluster.settings.model import Model
from hycluster.watchdog import end_this_process

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
# An ingress process on a machine that has just joined takes longer than this to start.
LOOK_FOR_OTHERS_EVERY_S = 5.0
# Stages of a start, as people read them: the model's files are found or made; the engine loads them and serves a first
# request of its own.
WEIGHTS_STAGE, ENGINE_STAGE = "weights", "engine"


def _one_machine() -> bool:
    """Whether Ray has no node anywhere else."""
    return len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}) == 1


@dataclass(frozen=True, slots=True)
class DrainTimes:
    """How long a replica that drains goes on with what it has; settings of the same names."""

    timeout_s: float
    hand_over_after_s: float


def _own_id() -> str:
    """Its actor's, by which Ray's tools name it and its start is told of; enough of it to be its own."""
    actor: str | None = ray.get_runtime_context().get_actor_id()
    return actor[:16] if actor else secrets.token_hex(8)


def _untold(_: str) -> None:
    """Nobody is to hear how far a start is."""


def start_engine(model: Model, place: GroupRank | None = None, stage: Callable[[str], None] = _untold) -> Engine:
    """The engine that the settings ask for; blocks until it can serve.

    Args:
        place: its place in its data-parallel group; then blocks until all ranks of the group can.
        stage: is told each stage as it begins.

    Raises:
        SettingsError: the settings, or the model's files, are wrong.
        EngineStartFailed: they are right but the engine can't start.
    """
    if model.simulated is not None:
        stage(ENGINE_STAGE)
        from hycluster.engine.simulated import SimulatedEngine

        return SimulatedEngine(model.simulated, model.name)
    # What is wrong with the files is said without the ten seconds of CPU time that the import takes.
    stage(WEIGHTS_STAGE)
    files = model_files(model)
    stage(ENGINE_STAGE)
    with without_collector():
        from hycluster.engine.vllm import VllmEngine

    return VllmEngine(model, files, place)


class Rank:
    """A started engine, reachable for gateways. They hear of it once it reports.

    Args:
        directory: name of the directory to report to.
        group: name of the data-parallel group; None if the engine runs by itself.
        place: the engine's place in it.
        stage: is told each stage of the start as it begins.

    Raises:
        SettingsError, EngineStartFailed: as :func:`start_engine`, or the data plane has no free port.
    """

    def __init__(
        self,
        model: Model,
        data_plane: DataPlane,
        directory: str,
        group: str | None = None,
        place: GroupRank | None = None,
        stage: Callable[[str], None] = _untold,
    ) -> None:
        self._model = model
        self._group = group
        self._directory = open_directory(directory)
        self._accepting = True
        self._stopped = threading.Event()
        self._reporter = threading.Thread(target=self._keep_reporting, name="reporter", daemon=True)
        self._engine = start_engine(model, place, stage)
        self._health = EngineHealth(self._engine, model.health, end_this_process)
        # A worker's parent is its node's raylet.
        self._memory = MemoryGuard(psutil.Process(os.getppid()), bound_bytes=bound_bytes(model), end=end_this_process)
        self._alone = data_plane.host is None and _one_machine()
        self._server = EngineServer(
            self._engine,
            replica_id=_own_id(),
            model=model.name,
            host=data_plane.host or (LOOPBACK if self._alone else ray.util.get_node_ip_address()),
            ports=data_plane,
        )

    @property
    def address(self) -> ReplicaAddress:
        return self._server.address

    def report(self, siblings: Sequence[ReplicaAddress] = ()) -> None:
        """Be there for gateways, from now on.

        Args:
            siblings: the other ranks of the group; all of them have started.
        """
        self._server.join(siblings, self._sibling_lost)
        self._reporter.start()
        self._health.start()
        self._memory.start()

    def _sibling_lost(self, replica_id: str) -> None:
        """A rank has gone, or its machine: this one would wait for it for ever, in the midst of a step."""
        if self._accepting:
            end_this_process(f"rank {replica_id} of its group is lost")

    def _keep_reporting(self) -> None:
        looked_s, unanswered = time.monotonic(), SparingLog(logger, logging.WARNING)
        while self._engine.error is None:
            try:
                if self._alone and time.monotonic() - looked_s > LOOK_FOR_OTHERS_EVERY_S:
                    looked_s = time.monotonic()
                    self._look_for_others()
                report = ReplicaReport(self.address, self._engine.load(), self._accepting, self._group)
                ray.get(self._directory.report.remote(self._model, report), timeout=FORGET_AFTER_S)
            except ray.exceptions.RayError:
                # The directory is starting again; the next report finds it.
                unanswered.write("the directory does not answer", exc_info=True)
            if self._stopped.wait(REPORT_EVERY_S):
                return

    def _look_for_others(self) -> None:
        self._alone = _one_machine()
        if not self._alone:
            self._server.listen_at(ray.util.get_node_ip_address())

    def check_health(self) -> None:
        """Raise RuntimeError unless the engine lives and gets on with its work."""
        if problem := self._health.problem():
            raise RuntimeError(problem)

    def wait_until_ended(self) -> None:
        """Block until the engine has ended, in good order or not."""
        self._server.wait_until_ended()

    async def drain(self, patience: DrainTimes) -> None:
        """Take no new requests; return when those in flight have ended, are to go on elsewhere, or time is over."""
        self._accepting = False
        # Gateways hear of it after one report and one sync; until then they may still send.
        await asyncio.sleep(3 * REPORT_EVERY_S)
        try:
            async with asyncio.timeout(patience.timeout_s):
                began = time.monotonic()
                # The engine tells nobody when it has become idle.
                while (load := self._engine.load()).running or load.waiting:
                    if time.monotonic() - began >= patience.hand_over_after_s and await self._others_able():
                        logger.warning("handing over after %.0f s: %s", patience.hand_over_after_s, load)
                        return
                    await asyncio.sleep(0.1)
        except TimeoutError:
            logger.warning("drain time of %.0f s is over; %s", patience.timeout_s, self._engine.load())

    async def _others_able(self) -> bool:
        """Some replica of the model takes requests; this one does not any more."""
        try:
            async with asyncio.timeout(FORGET_AFTER_S):
                ready: dict[str, int] = await self._directory.models.remote()
        except (ray.exceptions.RayError, TimeoutError):
            # The directory is starting again, or its machine is gone; ask once more.
            return False
        return ready.get(self._model.name, 0) > 0

    async def stop(self) -> None:
        """Leave the directory, end the engine. All ranks of a group stop at the same time."""
        self._stopped.set()
        await asyncio.to_thread(self._health.stop)
        await asyncio.to_thread(self._memory.stop)
        if self._reporter.is_alive():
            await asyncio.to_thread(self._reporter.join)
        try:
            async with asyncio.timeout(FORGET_AFTER_S):
                await self._directory.leave.remote(self._model.name, self.address.replica_id)
        except (ray.exceptions.RayError, TimeoutError):
            # It forgets by itself those that report no more.
            logger.warning("the directory does not answer", exc_info=True)
        await asyncio.to_thread(self._engine.shutdown)
        await asyncio.to_thread(self._server.close)
