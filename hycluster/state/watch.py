"""Where an ingress process has the cluster's state from. However many look: it is read once a second."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import ray

from hycluster import __version__
from hycluster.directory.directory import Survey
from hycluster.pool_health import PoolHealth
from hycluster.settings.objectives import Objectives
from hycluster.state.cluster_state import BatchState, ClusterState, cluster_state

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
# A store may be far away, and a list of it costs money there.
BATCHES_EVERY_S = 5.0
ANSWER_WITHIN_S = 3.0


class StateWatch:
    """The state of the cluster, for whoever asks at this ingress process.

    Args:
        survey: asks the directory.
        pools: what this ingress process says of its replicas; :meth:`open` takes the place of it.
        batches: reads them from the store, newest first, and blocks; None where there is no Batch API.
        objectives: by which traffic is judged.
    """

    def __init__(
        self,
        survey: Callable[[], Awaitable[Survey]],
        pools: Callable[[], Awaitable[Mapping[str, PoolHealth]]],
        batches: Callable[[], Sequence[BatchState]] | None,
        objectives: Objectives = Objectives(),  # noqa: B008 - it can't change
    ) -> None:
        self._survey = survey
        self._objectives = objectives
        self._pools = pools
        self._read_batches = batches
        self._open = False
        self._last: ClusterState | None = None
        self._looked_s = float("-inf")
        self._looking = asyncio.Lock()
        self._batches: Sequence[BatchState] = ()
        self._batches_problem = ""
        self._reading: asyncio.Task[None] | None = None
        self._read_s = float("-inf")

    def open(self, pools: Callable[[], Awaitable[Mapping[str, PoolHealth]]]) -> None:
        """This ingress process can serve from now on."""
        self._pools = pools
        self._open = True
        self._looked_s = float("-inf")

    async def now(self) -> ClusterState:
        """The state, at most a second old; batches, at most some seconds. Never waits for the store."""
        async with self._looking:
            if self._last is None or time.monotonic() - self._looked_s >= LOOK_EVERY_S:
                self._last = await self._look()
                self._looked_s = time.monotonic()
            return self._last

    async def _look(self) -> ClusterState:
        reading = self._reading is not None and not self._reading.done()
        if self._read_batches is not None and not reading and time.monotonic() - self._read_s >= BATCHES_EVERY_S:
            self._reading = asyncio.create_task(self._read(self._read_batches))
            # Of a store on a disk the first page has them already.
            await asyncio.wait({self._reading}, timeout=0.5)
        survey, problems = Survey(), [self._batches_problem] if self._batches_problem else []
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                survey = await self._survey()
        except (ray.exceptions.RayError, TimeoutError):
            problems.append("the directory does not answer; what is shown is what this ingress process knows by itself")
        pools = await self._pools()
        batches = None if self._read_batches is None else self._batches
        state = cluster_state(
            survey,
            pools,
            version=__version__,
            open_here=self._open,
            batches=batches,
            objectives=self._objectives,
        )
        return dataclasses.replace(state, problems=(*state.problems, *problems)) if problems else state

    async def _read(self, read: Callable[[], Sequence[BatchState]]) -> None:
        try:
            self._batches, self._batches_problem = await asyncio.to_thread(read), ""
        except OSError as error:
            logger.warning("batches.store can't be read", exc_info=error)
            self._batches_problem = f"batches.store: can't be read: {type(error).__name__}"
        self._read_s = time.monotonic()

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
