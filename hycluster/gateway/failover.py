"""What becomes of requests whose replica is lost: they go on elsewhere, wait for a place there, or end with an error.

A request goes on behind the tokens that it has (``hycluster/engine/migrated.py``); whoever waits for it sees a pause.
One that replica after replica dies of (``hycluster/gateway/flight.py``) ends: it must not be migrated through the whole
pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from hycluster.errors import HyclusterError, ReplicaLost, Unavailable, kind_name
from hycluster.gateway.flight import Flight
from hycluster.gateway.tasks import Tasks
from hycluster.observe.failover import Migrations

Send = Callable[[Flight], Awaitable[None]]
Tell = Callable[[str, HyclusterError], Awaitable[None]]


class Failover:
    """All requests of one pool's client, on a replica or on the way to one.

    Args:
        send: sends a request to a replica; raises Unavailable if none takes it now.
        on_lost: told of each request that ends because its replica was lost: Unavailable, ReplicaLost, KillsReplicas;
            or because its engine knows what is wrong with it: InvalidInput.
        wait_s: how long a request whose replica was lost waits for another one.

    Attributes:
        flights: by the id that their callers gave them.
        migrated: what the loss of replicas has cost.
        tasks: one for each request that has no place yet.
    """

    def __init__(self, send: Send, on_lost: Tell, *, wait_s: float) -> None:
        self.flights: dict[str, Flight] = {}
        self.migrated = Migrations()
        self.tasks = Tasks()
        self._send = send
        self._on_lost = on_lost
        self._wait_s = wait_s
        # Set, and replaced, whenever there may be a place for a request that waits for one.
        self._place_free = asyncio.Event()

    def wake(self) -> None:
        """Have those that wait for a place look again."""
        self._place_free.set()
        self._place_free = asyncio.Event()

    def landed(self, flight: Flight) -> None:
        """Nobody waits for it any more, whether it has come to its end or not."""
        self.flights.pop(flight.request_id, None)
        self.migrated.ended(flight.request_id)
        if flight.suspected or not flight.replica_id:
            # Others of its kind may go where it was; who waits to send it waits in vain.
            self.wake()

    def lost(self, flight: Flight, heard_s: float, *, died: bool) -> None:
        """Its replica is gone, of which the last word came at ``heard_s``; see ``Flight.lost`` for ``died``."""
        self.migrated.lost(flight.request_id, heard_s)
        if flight.track is not None:
            flight.track.lost(heard_s, "died" if died else "drained")
        flight.lost(died=died)
        self.tasks.spawn(self._carry_over(flight, died))

    def gave_back(self, flight: Flight, heard_s: float) -> None:
        """Its replica has ended it, though nobody asked for that: it goes on elsewhere."""
        self.migrated.ended(flight.request_id)
        if flight.suspected:
            self.wake()
        self.lost(flight, heard_s, died=False)

    def refused(self, flight: Flight, error: HyclusterError) -> None:
        """Its engine has found that no engine can do it."""
        if flight.suspected:
            self.wake()
        # Who asks for several at once drops this one with another of them before its own word is told.
        flight.replica_id = ""
        self.tasks.spawn(self._give_up(flight, error))

    def wait_for_first(self, flight: Flight, wait_s: float, error: HyclusterError) -> None:
        """Send a new request as soon as there is a replica; if there is none for so long, it ends with this error."""
        self.flights[flight.request_id] = flight
        self.tasks.spawn(self._wait_for_first(flight, wait_s, error))

    async def close(self) -> None:
        """Drop all requests."""
        # Those that wait for a place find that nobody waits for them.
        self.flights.clear()
        self.wake()
        await self.tasks.finish()

    async def _carry_over(self, flight: Flight, died: bool) -> None:
        """Have a request computed further by another replica, or tell why not."""
        error = flight.verdict(died=died)
        if error is None:
            recomputed_tokens = flight.prompt_tokens + len(flight.output) if flight.begun else 0
            try:
                if await self._find_place(flight, self._wait_s):
                    self.migrated.moved(recomputed_tokens)
                return
            except TimeoutError:
                kind = ReplicaLost if died else Unavailable
                error = kind(
                    "the replica that ran this request was lost, and there was no place for it on another one"
                    f" within {self._wait_s:.0f} s",
                    retry_after_s=1.0,
                )
        await self._give_up(flight, error)

    async def _wait_for_first(self, flight: Flight, wait_s: float, error: HyclusterError) -> None:
        try:
            await self._find_place(flight, wait_s)
        except TimeoutError:
            await self._give_up(flight, error)

    async def _find_place(self, flight: Flight, wait_s: float) -> bool:
        """Send a request once a replica takes it; False if it was aborted meanwhile.

        Raises:
            TimeoutError: none has, for ``wait_s`` seconds.
        """
        async with asyncio.timeout(wait_s):
            while self._awaited(flight):
                place_free = self._place_free
                try:
                    await self._send(flight)
                    return True
                except Unavailable:
                    await place_free.wait()
        return False

    async def _give_up(self, flight: Flight, error: HyclusterError) -> None:
        if self._awaited(flight):
            del self.flights[flight.request_id]
            self.migrated.ended(flight.request_id)
            if flight.track is not None:
                flight.track.end(kind_name(error))
            await self._on_lost(flight.request_id, error)

    def _awaited(self, flight: Flight) -> bool:
        return self.flights.get(flight.request_id) is flight
