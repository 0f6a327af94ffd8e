"""A data-parallel group: ranks that share a model's experts, each with an engine and requests of its own.

Rank 0 lives in the replica's actor and starts the others as actors in the replica's placement group; as they are
rank 0's, they end with it. Gateways send to each rank directly. In a step the ranks wait for each other, so one that
is lost leaves the others waiting for ever: the group starts, drains and ends as a whole.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hycluster import logs
from hycluster.core import ReplicaAddress
from hycluster.engine.protocol import GroupRank
from hycluster.errors import HyclusterError, start_failure
from hycluster.replica.placement import actor_options, bundle_of
from hycluster.replica.rank import DrainTimes, Rank
from hycluster.settings.load import DataPlane
from hycluster.settings.model import Model

logger = logging.getLogger(__name__)


class OtherRank:
    """Actor of a rank other than 0.

    Raises:
        RuntimeError: the engine could not start; see :func:`hycluster.errors.start_failure`.
    """

    def __init__(self, model: Model, data_plane: DataPlane, directory: str, group: str, place: GroupRank) -> None:
        logs.settle(f"rank{place.rank}")
        try:
            self._rank = Rank(model, data_plane, directory, group, place)
        except HyclusterError as error:
            raise start_failure(error) from None

    async def started(self) -> ReplicaAddress:
        """Answers once the engine has started."""
        return self._rank.address

    async def report(self, siblings: list[ReplicaAddress]) -> None:
        self._rank.report(siblings)

    async def check_health(self) -> None:
        self._rank.check_health()

    async def ended(self) -> None:
        """Answers when the engine has ended."""
        await asyncio.to_thread(self._rank.wait_until_ended)

    async def drain(self, patience: DrainTimes) -> None:
        await self._rank.drain(patience)

    async def stop(self) -> None:
        await self._rank.stop()

    async def pid(self) -> int:
        return os.getpid()


class RankGroup:
    """All ranks of one replica, seen from rank 0. Building it starts them.

    Raises:
        SettingsError, EngineStartFailed: rank 0 could not start.
        ray.exceptions.RayActorError: another one could not; its text has the reason.
    """

    def __init__(
        self,
        model: Model,
        data_plane: DataPlane,
        directory: str,
        placement: PlacementGroup,
        stage: Callable[[str], None],
    ) -> None:
        self.name = secrets.token_hex(8)
        self._stopping = False
        host = data_plane.host or ray.util.get_node_ip_address()
        # Kept, as the ranks find each other there.
        self._store = None if model.simulated else _open_store(host)
        port = self._store.port if self._store else 0
        size = model.parallel.data
        actor: Any = ray.remote(OtherRank)
        self._others = [
            actor.options(
                **actor_options(model, rank),
                max_concurrency=16,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement, placement_group_bundle_index=bundle_of(model, rank)
                ),
            ).remote(model, data_plane, directory, self.name, GroupRank(rank, size, host, port))
            for rank in range(1, size)
        ]
        place = GroupRank(0, size, host, port)
        own = _in_thread(lambda: Rank(model, data_plane, directory, self.name, place, stage))
        addresses = self._wait_until_started(own)
        self.rank = own.result()
        everyone = [self.rank.address, *addresses]
        ray.get(
            [
                other.report.remote([address for address in everyone if address != own_address])
                for other, own_address in zip(self._others, addresses, strict=True)
            ]
        )
        self.rank.report(addresses)
        for watch in (self._end_with_own, self._end_with_others):
            threading.Thread(target=watch, name="group", daemon=True).start()

    def _wait_until_started(self, own: Future[Rank]) -> list[ReplicaAddress]:
        """Where the other ranks are. One that can't start leaves all waiting for it in the midst of torch: give up."""
        started = [other.started.remote() for other in self._others]
        waiting = started
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=0.2)
            ray.get(ready)
            if own.done():
                own.result()
        addresses: list[ReplicaAddress] = ray.get(started)
        return addresses

    def _end_with_own(self) -> None:
        self.rank.wait_until_ended()
        self._lost("the engine of rank 0 ended")

    def _end_with_others(self) -> None:
        (ended, *_), _ = ray.wait([other.ended.remote() for other in self._others], num_returns=1)
        try:
            ray.get(ended)
        except ray.exceptions.RayError as error:
            self._lost(f"a rank was lost: {error}")
        self._lost("the engine of a rank ended")

    def _lost(self, why: str) -> None:
        if self._stopping:
            return
        logger.error("the group ends: %s", why)
        # The engine may be waiting for the lost rank, where nothing can reach it; Ray ends the other ranks with this
        # process, and Serve replaces them all.
        os._exit(1)

    async def check_health(self) -> None:
        """Raise RuntimeError unless all ranks are well."""
        self.rank.check_health()
        await asyncio.gather(*(other.check_health.remote() for other in self._others))

    async def stop(self, patience: DrainTimes) -> None:
        """Drain all ranks, then end them."""
        await asyncio.gather(self.rank.drain(patience), *(other.drain.remote(patience) for other in self._others))
        self._stopping = True
        await asyncio.gather(self.rank.stop(), *(other.stop.remote() for other in self._others))
        for other in self._others:
            ray.kill(other)

    async def pids(self) -> list[int]:
        """The ranks' processes, in the order of the ranks."""
        return [os.getpid(), *await asyncio.gather(*(other.pid.remote() for other in self._others))]


def _open_store(host: str) -> Any:
    """torch's key-value store in this process, on a free port."""
    import torch.distributed

    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        host, 0, is_master=True, wait_for_workers=False
    )


def _in_thread(build: Callable[[], Rank]) -> Future[Rank]:
    """Build a rank on a thread of its own; a rank that waits for a lost one can't be interrupted."""
    future: Future[Rank] = Future()

    def run() -> None:
        try:
            future.set_result(build())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="start", daemon=True).start()
    return future
