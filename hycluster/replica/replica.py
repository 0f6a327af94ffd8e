"""A replica: one engine, or a data-parallel group of them, as Ray sees it.

The same class serves as a Ray Serve deployment (``hycluster/app.py``) and, for a batch job with engines
of its own, as a plain actor (``hycluster/dedicated.py``). Ray starts, places and watches it; the tokens go
past Ray, over the sockets of ``hycluster/replica/wire.py``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Coroutine
from typing import Any, cast

import ray
from ray.util.placement_group import PlacementGroup

from hycluster import logs
from hycluster.directory.directory import open_directory
from hycluster.errors import EngineStartFailed, HyclusterError, Unavailable, one_line, reported, start_failure
from hycluster.replica.group import RankGroup
from hycluster.replica.rank import DrainTimes, Rank
from hycluster.settings.load import DataPlane
from hycluster.settings.model import Model

logger = logging.getLogger(__name__)

# How long a start that asks the directory for its turn waits for an answer; without one it goes ahead.
DIRECTORY_TIMEOUT_S = 10.0
LOOK_EVERY_S = 1.0


class Replica:
    """One member of one model's pool.

    Args:
        directory: name of the directory to report to.
        patience: how long requests in flight may go on here when the replica is stopped.

    Raises:
        RuntimeError: an engine could not start; see :func:`hycluster.errors.start_failure`.
    """

    def __init__(self, model: Model, data_plane: DataPlane, directory: str, patience: DrainTimes) -> None:
        logs.settle("replica")
        self._patience = patience
        self._group: RankGroup | None = None
        start = _Start(model, directory)
        start.wait()
        try:
            if model.parallel.data > 1:
                placement = cast(PlacementGroup, ray.util.get_current_placement_group())
                self._group = RankGroup(model, data_plane, directory, placement, start.stage)
                self._rank = self._group.rank
            else:
                self._rank = Rank(model, data_plane, directory, stage=start.stage)
                self._rank.report()
            start.ended()
        except HyclusterError as error:
            start.failed(error)
            raise start_failure(error) from None
        except Exception as error:
            start.failed(reported(str(error)) or EngineStartFailed(f"{type(error).__name__}: {error}"))
            raise

    async def check_health(self) -> None:
        """Called by Ray Serve; raising makes it replace this replica."""
        if self._group is None:
            self._rank.check_health()
        else:
            await self._group.check_health()

    async def stop(self) -> None:
        """Drain, leave the directory, end the engine."""
        if self._group is None:
            await self._rank.drain(self._patience)
            await self._rank.stop()
        else:
            await self._group.stop(self._patience)

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Ray Serve calls this when it stops a replica, and awaits the answer.

        Not ``async``, as Python calls it too, and awaits nothing, on what never started.
        """
        return self.stop() if hasattr(self, "_rank") else None

    async def ready(self) -> dict[str, Any]:
        """Answers once the engine has started; which processes hold it, for tools and tests."""
        pids = [os.getpid()] if self._group is None else await self._group.pids()
        return {"replica_id": self._rank.address.replica_id, "pid": pids[0], "pids": pids}


class _Start:
    """One start of a replica, as the directory is told of it."""

    def __init__(self, model: Model, directory: str) -> None:
        self._model = model
        self._directory = open_directory(directory)
        self._id = ray.get_runtime_context().get_actor_id()

    def wait(self) -> None:
        """Wait for its turn, if others of its model failed before it."""
        try:
            begun: Any = self._directory.begin_start.remote(self._model, self._id)
            pause_s: float = ray.get(begun, timeout=DIRECTORY_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError):
            logger.warning("the directory does not answer; starting at once", exc_info=True)
            return
        turn_s = time.monotonic() + pause_s
        while (left_s := turn_s - time.monotonic()) > 0:
            time.sleep(min(left_s, LOOK_EVERY_S))
            # Serve can't stop a replica whose constructor has not returned, and waits for it as for one that drains.
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                closing: Any = self._directory.closing.remote()
                if ray.get(closing, timeout=DIRECTORY_TIMEOUT_S):
                    raise start_failure(Unavailable("the service ended before this start had its turn"))

    def stage(self, name: str) -> None:
        """It has come to its next stage. Nobody waits for an answer: it is only shown."""
        self._directory.start_stage.remote(self._model.name, self._id, name)

    def ended(self) -> None:
        self._directory.start_ended.remote(self._model.name, self._id)

    def failed(self, error: HyclusterError) -> None:
        # Nobody waits for the answer: this process is to end.
        self._directory.start_failed.remote(self._model, self._id, type(error).__name__, one_line(error.message))
