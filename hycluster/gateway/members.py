"""The replicas that a pool's client is connected to: new ones are greeted, lost ones taken out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

import zmq.asyncio
from vllm.v1.engine import EngineCoreOutputs

from hycluster.core import ReplicaAddress
from hycluster.directory.directory import ReplicaReport
from hycluster.gateway.connection import connect
from hycluster.gateway.failover import Failover
from hycluster.gateway.link import Link
from hycluster.gateway.prefixes import Prefixes
from hycluster.gateway.tasks import Tasks
from hycluster.observe.gateways import KnownReplica
from hycluster.replica.sparing_log import SparingLog

logger = logging.getLogger(__name__)

# Of so many replicas that are here no more, what was counted stays to be scraped.
REMEMBERED_REPLICAS = 32
# A replica that is there greets back within milliseconds. One whose machine is gone, and which the directory names a
# while yet, must not keep the rest of its news waiting.
JOIN_PATIENCE_S = 1.0


class Members:
    """A pool's links.

    Args:
        prefixes: hears what becomes of replicas' KV blocks; None: nobody is to.
        gateway_id: this gateway's key in what a replica says of gateways.

    Attributes:
        links: by replica id.
        known: by the number that outputs carry, replicas that are here, and the last ones that were.
        lost: links that ended while their replicas took requests.
        first: set once there has been one.
    """

    def __init__(
        self,
        failover: Failover,
        arrived: asyncio.Queue[EngineCoreOutputs],
        prefixes: Prefixes | None = None,
        gateway_id: str = "",
    ) -> None:
        self.links: dict[str, Link] = {}
        self.known: dict[int, KnownReplica] = {}
        self.lost = 0
        self.first = asyncio.Event()
        self._failover = failover
        self._arrived = arrived
        self._prefixes = prefixes
        self._gateway_id = gateway_id
        self._context = zmq.asyncio.Context()
        self._connecting: dict[str, asyncio.Task[None]] = {}
        # The directory names it twice a second.
        self._unreached = SparingLog(logger, logging.WARNING)
        self._joining = Tasks()
        self._parting = Tasks()
        # On replicas that are here no more.
        self._worked_off_tokens = 0

    @property
    def worked_off_tokens(self) -> int:
        """See :class:`Link`; of all that there are and were."""
        return self._worked_off_tokens + sum(link.worked_off_tokens for link in self.links.values())

    async def update(self, reports: Iterable[ReplicaReport]) -> None:
        """Connect to replicas that are new, take the loads of those that are known."""
        reports = list(reports)
        # Successors first: no request may find that the old replica takes none any more, and no other one yet.
        await self.join(reports)
        for report in reports:
            link = self.links.get(report.address.replica_id)
            if link is not None:
                if report.accepting and not link.accepting:
                    self._failover.wake()
                link.accepting = report.accepting
                link.note(report.load)

    async def join(self, reports: Iterable[ReplicaReport]) -> None:
        """Connect to replicas that are new and take requests; leaves what is connected as it is."""
        new = [r.address for r in reports if r.accepting and r.address.replica_id not in self.links]
        for address in new:
            # Before its task has begun: an update beside this one must not connect a second time, since the second
            # link would take the first one's place and not know its requests.
            if address.replica_id not in self._connecting:
                self._connecting[address.replica_id] = self._joining.spawn(self._join(address))
        if joining := [self._connecting[address.replica_id] for address in new]:
            await asyncio.wait(joining, timeout=JOIN_PATIENCE_S)

    async def _join(self, address: ReplicaAddress) -> None:
        try:
            connection = await connect(self._context, address, follow_blocks=self._prefixes is not None)
        except ConnectionError as error:
            # The directory may still name a replica that has just died; its next word decides.
            self._unreached.write("no connection to replica %s: %s", address.replica_id, error)
            return
        finally:
            del self._connecting[address.replica_id]
        known = KnownReplica(max(self.known, default=-1) + 1, address.replica_id)
        self.known[known.number] = known
        link = Link(connection, known, self._arrived, self._failover, self._part, self._prefixes, self._gateway_id)
        self.links[address.replica_id] = link
        self.first.set()
        self._failover.wake()

    def _part(self, link: Link) -> None:
        del self.links[link.replica_id]
        if self._prefixes is not None:
            self._prefixes.forget(link.replica_id)
        self.lost += link.accepting
        link.known.gone, link.known.last = True, link.load
        # In the order in which they went: one that was away for a moment has a later number than those that were not.
        self.known[link.known.number] = self.known.pop(link.known.number)
        gone = [known.number for known in self.known.values() if known.gone]
        for number in gone[:-REMEMBERED_REPLICAS]:
            del self.known[number]
        self._worked_off_tokens += link.worked_off_tokens
        self._parting.spawn(link.close())

    async def leave(self) -> None:
        """Say goodbye to every replica; what is still in flight there is dropped."""
        await self._joining.cancel()
        links, self.links = list(self.links.values()), {}
        for link in links:
            link.leave()
        for link in links:
            await link.close(say_bye=True)

    async def close(self) -> None:
        """Close what is open; the last call."""
        # A socket that were left open would hold up the context's end for ever.
        await self._parting.finish()
        self._context.destroy(linger=500)
