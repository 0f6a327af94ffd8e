"""A replica: one engine in a Ray actor, its sockets, its reports to the directory, its health, its drain.

The same class serves as a Ray Serve deployment (``hycluster/app.py``) and, for a batch job with engines
of its own, as a plain actor (``hycluster/cluster.py``). Ray starts, places and watches it; the tokens go
past Ray, over the sockets of ``hycluster/wire.py``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
from typing import Any

import ray

from hycluster.config import DataPlane, Model
from hycluster.directory import FORGET_AFTER_S, REPORT_EVERY_S, ReplicaReport, open_directory
from hycluster.engine.arguments import model_files
from hycluster.engine.protocol import Engine
from hycluster.errors import HyclusterError
from hycluster.wire import EngineServer

logger = logging.getLogger(__name__)

# An engine that has work and finishes no step for this long is taken for hung.
HUNG_AFTER_S = 120.0


def start_engine(model: Model) -> Engine:
    """The engine that the settings ask for; blocks until it can serve.

    Raises:
        SettingsError: the settings, or the model's files, are wrong.
        EngineStartFailed: they are right but the engine can't start.
    """
    if model.simulated is not None:
        from hycluster.engine.simulated import SimulatedEngine

        return SimulatedEngine(model.simulated)
    from hycluster.engine.vllm import VllmEngine

    return VllmEngine(model, model_files(model))


START_FAILURE = "hycluster: "


def start_failure(error: HyclusterError) -> RuntimeError:
    """Why an engine or a door can't start, in a form that comes through Ray's reports as one line.

    Ray turns an actor's error into text; ``hycluster/cluster.py`` finds this line in it again.
    """
    return RuntimeError(f"{START_FAILURE}{type(error).__name__}: {error.message}")


class Replica:
    """One engine of one model's pool.

    Args:
        directory: name of the directory to report to.
        drain_timeout_s: how long requests in flight may take to finish when the replica is stopped.

    Raises:
        RuntimeError: the engine could not start; see :func:`start_failure`.
    """

    def __init__(self, model: Model, data_plane: DataPlane, directory: str, drain_timeout_s: float) -> None:
        self._model = model
        self._drain_timeout_s = drain_timeout_s
        self._directory = open_directory(directory)
        self._accepting = True
        try:
            self._engine = start_engine(model)
            host = data_plane.host or ray.util.get_node_ip_address()
            self._server = EngineServer(
                self._engine,
                replica_id=secrets.token_hex(8),
                model=model.name,
                host=host,
                ports=data_plane,
            )
        except HyclusterError as error:
            raise start_failure(error) from None
        self._stopped = threading.Event()
        self._reporter = threading.Thread(target=self._keep_reporting, name="reporter", daemon=True)
        self._reporter.start()

    def _keep_reporting(self) -> None:
        while self._engine.error is None:
            try:
                ray.get(self._directory.report.remote(self._model, self._report()), timeout=FORGET_AFTER_S)
            except ray.exceptions.RayError:
                # The directory is starting again; the next report finds it.
                logger.warning("the directory does not answer", exc_info=True)
            if self._stopped.wait(REPORT_EVERY_S):
                return

    def _report(self) -> ReplicaReport:
        return ReplicaReport(self._server.address, self._engine.load(), self._accepting)

    async def check_health(self) -> None:
        """Called by Ray Serve; raising makes it replace this replica."""
        if self._engine.error is not None:
            raise RuntimeError(f"engine died: {self._engine.error}")
        age = self._engine.last_step_age_s
        if age is not None and age > HUNG_AFTER_S:
            raise RuntimeError(f"engine hung: no step for {age:.0f} s while it has work")

    async def drain(self) -> None:
        """Take no new requests; return when the last one in flight has ended or the drain time is over."""
        self._accepting = False
        # Gateways hear of it after one report and one sync; until then they may still send.
        await asyncio.sleep(3 * REPORT_EVERY_S)
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                # The engine tells nobody when it has become idle.
                while (load := self._engine.load()).running or load.waiting:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        except TimeoutError:
            logger.warning("drain time of %.0f s is over; %s", self._drain_timeout_s, self._engine.load())

    async def stop(self) -> None:
        """Drain, leave the directory, end the engine."""
        await self.drain()
        self._stopped.set()
        await asyncio.to_thread(self._reporter.join)
        await self._directory.leave.remote(self._model.name, self._server.address.replica_id)
        await asyncio.to_thread(self._engine.shutdown)
        await asyncio.to_thread(self._server.close)

    async def __del__(self) -> None:
        """Ray Serve awaits this when it stops a replica."""
        if hasattr(self, "_reporter"):
            await self.stop()

    async def ready(self) -> dict[str, Any]:
        """Answers once the engine has started; which process holds it, for tools and tests."""
        return {"replica_id": self._server.address.replica_id, "pid": os.getpid()}
