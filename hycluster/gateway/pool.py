"""The pool as one engine core: what ``AsyncLLM`` talks to in the place of vLLM's own client.

Holds a connection to each replica of a model, sends each request to the replica that the router
chooses and gathers the outputs of all. A request whose replica is lost goes on elsewhere, behind the tokens that
it has (``hycluster/engine/carried.py``); whoever waits for it sees a pause. One that replica after replica dies of
(``hycluster/gateway/flight.py``) ends with an error: it must not be carried through the whole pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from types import SimpleNamespace
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from zmq.utils.monitor import recv_monitor_message

from hycluster.core import ExpertLoad, ReplicaAddress
from hycluster.directory.directory import ReplicaReport
from hycluster.engine.carried import carry
from hycluster.engine.protocol import EngineInfo
from hycluster.errors import HyclusterError, InvalidInput, ReplicaLost, Unavailable
from hycluster.gateway.control_calls import ControlCalls
from hycluster.gateway.flight import Flight
from hycluster.gateway.link import Link, connect
from hycluster.gateway.router import Candidate, Policy, RouteRequest
from hycluster.observe.failover import Carried
from hycluster.replica.wire import Kind

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 60.0
# A replica that is there greets back within milliseconds. One whose machine is gone, and which the directory names a
# while yet, must not keep the rest of its news waiting.
JOIN_PATIENCE_S = 1.0


class PoolClient(ControlCalls):
    """Stands where ``AsyncLLM`` expects its engine-core client. Lives on one event loop.

    Args:
        replicas: size of the pool, for the metrics' labels.
        wait_s: how long a request whose replica was lost waits for another one.
        cold_start_wait_s: how long a new request waits for a replica where there is none; None: it is refused.
        failover: keep each request's tokens, so that it can go on elsewhere; without, one that has begun ends.
        on_lost: told of each request that ends because its replica was lost: Unavailable, ReplicaLost, KillsReplicas.

    Attributes:
        gateway_id: random; tells this gateway's load from that of others.
        carried: what the loss of replicas has cost.
        first_replica: set once there has been a replica to send to.
        worked_off_tokens: how much less is outstanding for what replicas did, or because requests ended; only grows.
        resources: what ``AsyncLLM`` reads of its client's state; a pool as such never dies.
    """

    def __init__(
        self,
        model: str,
        policy: Policy,
        gateway_id: str,
        *,
        replicas: int,
        wait_s: float,
        cold_start_wait_s: float | None = None,
        failover: bool = True,
        on_lost: Callable[[str, HyclusterError], Awaitable[None]],
    ) -> None:
        self.model = model
        self.gateway_id = gateway_id
        self.carried = Carried()
        self._on_lost = on_lost
        self._wait_s = wait_s
        self._cold_start_wait_s = cold_start_wait_s
        self._failover = failover
        # Set, and replaced, whenever there may be a place for a request that waits for one.
        self._place_free = asyncio.Event()
        self._slots = replicas
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = [0]
        self._policy = policy
        self._context = zmq.asyncio.Context()
        self._links: dict[str, Link] = {}
        self._connecting: set[str] = set()
        self._joining: set[asyncio.Task[None]] = set()
        self._flights: dict[str, Flight] = {}
        self._arrived: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._calls: dict[int, tuple[Link, asyncio.Future[Any]]] = {}
        # Calls that went ahead of a request, and who waits for the answer.
        self._ahead: dict[int, tuple[Flight, asyncio.Event]] = {}
        self._next_call = 0
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        self._tasks: set[asyncio.Task[None]] = set()
        self.first_replica = asyncio.Event()
        self.worked_off_tokens = 0

    # -- the pool's members -------------------------------------------------------------------------

    async def update(self, reports: Iterable[ReplicaReport]) -> None:
        """Connect to replicas that are new, take the loads of those that are known."""
        reports = list(reports)
        new = [r.address for r in reports if r.accepting and r.address.replica_id not in self._links]
        # Successors first: no request may find that the old replica takes none any more, and no other one yet.
        joining = [self._spawn(self._connect(a)) for a in new if a.replica_id not in self._connecting]
        self._joining.update(joining)
        for task in joining:
            task.add_done_callback(self._joining.discard)
        if joining:
            await asyncio.wait(joining, timeout=JOIN_PATIENCE_S)
        for report in reports:
            link = self._links.get(report.address.replica_id)
            if link is not None:
                if report.accepting and not link.accepting:
                    self._wake()
                link.load, link.accepting = report.load, report.accepting

    async def _connect(self, address: ReplicaAddress) -> None:
        self._connecting.add(address.replica_id)
        try:
            link = await connect(self._context, address)
        except ConnectionError as error:
            # The directory may still name a replica that has just died; its next word decides.
            logger.warning("no connection to replica %s: %s", address.replica_id, error)
            return
        finally:
            self._connecting.discard(address.replica_id)
        link.slot = self._free_slot()
        self._links[address.replica_id] = link
        self.first_replica.set()
        self._wake()
        link.tasks = [asyncio.create_task(end(link)) for end in (self._read, self._watch, self._heed)]

    def _free_slot(self) -> int:
        """The number by which metrics tell replicas apart; a replacement takes over its predecessor's."""
        taken = {link.slot for link in self._links.values()}
        return next((slot for slot in range(self._slots) if slot not in taken), 0)

    async def _watch(self, link: Link) -> None:
        await recv_monitor_message(link.monitor)
        # The last words of a replica that has drained are whole answers: what has arrived is read first.
        while await link.outputs.poll(0):  # noqa: ASYNC110 - sockets tell nobody that they are empty
            await asyncio.sleep(0.005)
        self._lost(link, "its connection closed")

    async def _heed(self, link: Link) -> None:
        """A replica that took this gateway for gone refuses whatever it says, and sends no more outputs."""
        _, *reason = await link.requests.recv_multipart()
        self._lost(link, b" ".join(reason).decode(errors="replace"), died=False)

    async def _tell(self, link: Link, *frames: Any) -> bool:
        """Send without waiting: a socket takes all there is, unless its replica has gone."""
        try:
            await link.requests.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self._lost(link, "its connection closed")
            return False
        return True

    def _lost(self, link: Link, why: str, *, died: bool = True) -> None:
        if self._links.get(link.address.replica_id) is not link:
            return
        logger.warning("replica %s lost: %s; %d requests on it", link.address.replica_id, why, len(link.flights))
        del self._links[link.address.replica_id]
        flights = list(link.flights.values())
        link.flights.clear()
        for call_id, (flight, settled) in list(self._ahead.items()):
            if flight.replica_id == link.address.replica_id:
                del self._ahead[call_id]
                settled.set()
        self._spawn(self._close(link, say_bye=False))
        for flight in flights:
            # One that drains ends on purpose.
            self._move(flight, link.heard_s, died=died and link.accepting)

    def _move(self, flight: Flight, heard_s: float, *, died: bool) -> None:
        self.carried.lost(flight.request_id, heard_s)
        moved = self._flights[flight.request_id] = flight.lost(died=died)
        self._spawn(self._carry_over(moved, died))

    async def _carry_over(self, flight: Flight, died: bool) -> None:
        """Have a request computed further by another replica, behind the tokens that it has; or tell why not."""
        error = flight.verdict(died=died)
        if error is None:
            try:
                if await self._find_place(flight, self._wait_s):
                    self.carried.moved(flight.prompt_tokens + len(flight.output) if flight.begun else 0)
                return
            except TimeoutError:
                kind = ReplicaLost if died else Unavailable
                error = kind(
                    "the replica that ran this request was lost, and there was no place for it on another one"
                    f" within {self._wait_s:.0f} s",
                    retry_after_s=1.0,
                )
        await self._give_up(flight, error)

    async def _wait_for_first(self, flight: Flight, wait_s: float) -> None:
        """Send a new request as soon as there is a replica; or tell that there has been none."""
        try:
            await self._find_place(flight, wait_s)
        except TimeoutError:
            error = Unavailable(f"model: no replica of {self.model!r} could serve within {wait_s:g} s")
            await self._give_up(flight, error)

    async def _find_place(self, flight: Flight, wait_s: float) -> bool:
        """Send a request once a replica takes it; False if it was aborted meanwhile.

        Raises:
            TimeoutError: none has, for ``wait_s`` seconds.
        """
        async with asyncio.timeout(wait_s):
            while self._flights.get(flight.request_id) is flight:
                place_free = self._place_free
                try:
                    await self._send(flight)
                    return True
                except Unavailable:
                    await place_free.wait()
        return False

    async def _give_up(self, flight: Flight, error: HyclusterError) -> None:
        if self._flights.get(flight.request_id) is flight:
            del self._flights[flight.request_id]
            self.carried.ended(flight.request_id)
            await self._on_lost(flight.request_id, error)

    def _wake(self) -> None:
        self._place_free.set()
        self._place_free = asyncio.Event()

    # -- requests and outputs -----------------------------------------------------------------------

    @property
    def able(self) -> bool:
        """A request would find a replica now."""
        return any(link.accepting for link in self._links.values())

    @property
    def links(self) -> int:
        """Replicas connected and taking requests."""
        return sum(link.accepting for link in self._links.values())

    @property
    def expert_loads(self) -> dict[str, ExpertLoad]:
        """By replica id, how its experts are loaded, where it says so."""
        loads = {replica_id: link.load for replica_id, link in self._links.items()}
        return {replica_id: load.experts for replica_id, load in loads.items() if load and load.experts}

    @property
    def infos(self) -> list[EngineInfo]:
        return [link.info for link in self._links.values()]

    @property
    def outstanding(self) -> dict[str, int]:
        """By replica id, the tokens that this gateway has to prefill or decode there."""
        return {replica_id: link.outstanding_tokens for replica_id, link in self._links.items()}

    @property
    def outstanding_tokens(self) -> int:
        """On all replicas, and of requests that wait for one."""
        tokens = sum(self.outstanding.values())
        if self.requests_waiting:
            flights = self._flights.values()
            tokens += sum(flight.tokens_to_compute for flight in flights if flight.replica_id not in self._links)
        return tokens

    @property
    def requests_in_flight(self) -> int:
        return len(self._flights)

    @property
    def requests_waiting(self) -> int:
        """Those that no replica has."""
        return len(self._flights) - sum(len(link.flights) for link in self._links.values())

    def expected_tokens(self, output_tokens: int) -> int:
        """Of all requests, sent or waiting, what is likely to be left to prefill or decode; see ``Flight``."""
        return sum(flight.expected_tokens(output_tokens) for flight in self._flights.values())

    def _choose(self, flight: Flight) -> Link:
        links = [link for link in self._links.values() if link.accepting]
        if flight.suspected:
            # Beside another one like it, the next death would not tell which of them replicas die of.
            links = [link for link in links if not any(other.suspected for other in link.flights.values())]
        if not links:
            raise Unavailable(f"model: no replica of {self.model!r} can serve now", retry_after_s=1.0)
        if len(links) == 1:
            return links[0]
        candidates = [
            Candidate(
                replica_id=link.address.replica_id,
                own_tokens=link.outstanding_tokens,
                own_requests=len(link.flights),
                load=link.load,
            )
            for link in links
        ]
        route = RouteRequest(tokens=flight.tokens_to_compute, session_id=flight.request.session_id)
        return self._links[self._policy.choose(candidates, route)]

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Send a request to the replica that the router chooses, or keep it until there is one. Returns at once.

        Raises:
            Unavailable: no replica can serve, and new requests don't wait.
            InvalidInput: the request holds what no message can.
        """
        flight = Flight.of(request, keep=self._failover)
        try:
            await self._send(flight)
        except Unavailable:
            if self._cold_start_wait_s is None:
                raise
            # Now, while there is somebody to tell.
            self._encoded(request)
            self._flights[flight.request_id] = flight
            self._spawn(self._wait_for_first(flight, self._cold_start_wait_s))

    async def _send(self, flight: Flight) -> None:
        link = self._choose(flight)
        request = carry(flight.request, flight.engine_id, flight.output) if flight.moves else flight.request
        message = self._encoded(request)
        if not link.flights:
            link.heard_s = time.monotonic()
        flight = flight.sent(link.address.replica_id)
        self._flights[flight.request_id] = link.flights[flight.engine_id] = flight
        link.outstanding_tokens += flight.tokens_left
        if not flight.deaths:
            await self._add(link, flight, message)
            return
        # Ahead of it goes a call: if that is answered, its engine was there to get it.
        call_id, settled = self._call_id(), asyncio.Event()
        self._ahead[call_id] = flight, settled
        await self._tell(link, Kind.CALL, *self._encoder.encode((call_id, "get_supported_tasks", ())))
        if flight.suspected:
            # An engine that dies of it at once must not take the answer along.
            self._spawn(self._add(link, flight, message, after=settled))
        else:
            await self._add(link, flight, message)

    async def _add(self, link: Link, flight: Flight, message: Any, after: asyncio.Event | None = None) -> None:
        if after is not None:
            await after.wait()
        # Else the replica was lost, or the request aborted, meanwhile.
        if self._links.get(flight.replica_id) is link and link.flights.get(flight.engine_id) is flight:
            await self._tell(link, Kind.ADD, *message)

    def _encoded(self, request: EngineCoreRequest) -> Any:
        try:
            return self._encoder.encode(request)
        except (UnicodeEncodeError, OverflowError, TypeError) as error:
            # Half of a surrogate pair, a number over 64 bits: JSON can say what no message can hold.
            raise InvalidInput(f"request: holds what can't be sent to an engine: {error}") from None

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        by_link: dict[str, list[str]] = {}
        for request_id in request_ids:
            flight = self._flights.get(request_id)
            if flight is not None:
                by_link.setdefault(flight.replica_id, []).append(flight.engine_id)
                self._landed(flight)
        for replica_id, ids in by_link.items():
            link = self._links.get(replica_id)
            if link is not None:
                await self._tell(link, Kind.ABORT, msgspec.msgpack.encode(ids))

    def _landed(self, flight: Flight) -> None:
        """It is on no replica any more."""
        self._flights.pop(flight.request_id, None)
        self.carried.ended(flight.request_id)
        link = self._links.get(flight.replica_id)
        if link is not None and link.flights.pop(flight.engine_id, None) is not None:
            link.outstanding_tokens -= flight.tokens_left
            self.worked_off_tokens += flight.tokens_left
        if flight.suspected or link is None:
            # Others of its kind may go where it was; who waits to send it waits in vain.
            self._wake()

    async def _read(self, link: Link) -> None:
        recv, decode, flights = link.outputs.recv_multipart, self._decoder.decode, link.flights
        while True:
            frames = await recv(copy=False)
            if len(frames) == 1 and not len(frames[0].buffer):
                self._lost(link, "its engine ended")
                return
            outputs: EngineCoreOutputs = decode(frames)
            link.heard_s = time.monotonic()
            if outputs.utility_output is not None:
                self._answer(outputs.utility_output)
                continue
            spent, heard = 0, []
            for output in outputs.outputs:
                flight = flights.get(output.request_id)
                if flight is None:
                    # Aborted, or gone on elsewhere.
                    continue
                if output.finish_reason is FinishReason.ABORT:
                    # Not by its caller, so by a replica that ends: it goes on elsewhere.
                    link.accepting = False
                    self._landed(flight)
                    self._move(flight, link.heard_s, died=False)
                    continue
                output.request_id = flight.request_id
                heard.append(output)
                if flight.moves and not flight.begun:
                    self.carried.went_on(flight.request_id)
                if output.finish_reason is not None:
                    self._landed(flight)
                    continue
                spent += flight.take(output.new_token_ids)
                if flight.deaths and not flight.suspected:
                    self._wake()
            link.outstanding_tokens -= spent
            self.worked_off_tokens += spent
            outputs.outputs = heard
            outputs.engine_index = link.slot
            if outputs.outputs or outputs.scheduler_stats is not None:
                self._arrived.put_nowait(outputs)

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._arrived.get()

    # -- control ------------------------------------------------------------------------------------

    def _call_id(self) -> int:
        self._next_call += 1
        return self._next_call

    async def _call(self, link: Link, method: str, *arguments: Any) -> Any:
        call_id = self._call_id()
        future = asyncio.get_running_loop().create_future()
        self._calls[call_id] = link, future
        try:
            await self._tell(link, Kind.CALL, *self._encoder.encode((call_id, method, arguments)))
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await future
        finally:
            self._calls.pop(call_id, None)

    def _answer(self, output: Any) -> None:
        if (ahead := self._ahead.pop(output.call_id, None)) is not None:
            flight, settled = ahead
            flight.taken = True
            settled.set()
            return
        _, future = self._calls.get(output.call_id, (None, None))
        if future is None or future.done():
            return
        if output.failure_message is not None:
            future.set_exception(RuntimeError(output.failure_message))
        else:
            future.set_result(output.result.result)

    async def call_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a control method on every replica."""
        links = list(self._links.values())
        if not links:
            raise Unavailable(f"model: no replica of {self.model!r} can serve now", retry_after_s=1.0)
        return await asyncio.gather(*(self._call(link, method, *arguments) for link in links))

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        for info in self.infos:
            return info.supported_tasks
        return ("generate",)

    def dp_engines_running(self) -> bool:
        return bool(self._flights)

    def get_kv_event_sources(self) -> dict[int, Any]:
        return {}

    # -- the end ------------------------------------------------------------------------------------

    def _spawn(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _close(self, link: Link, *, say_bye: bool) -> None:
        for of, future in self._calls.values():
            if of is link and not future.done():
                future.set_exception(Unavailable("the replica was lost before it answered", retry_after_s=1.0))
        current = asyncio.current_task()
        for task in link.tasks:
            if task is not current:
                task.cancel()
        for task in link.tasks:
            if task is not current:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if say_bye:
            await self._tell(link, Kind.BYE)
        link.close(linger_ms=500 if say_bye else 0)

    async def close(self) -> None:
        """Say goodbye to every replica; what is still in flight there is dropped."""
        for task in list(self._joining):
            task.cancel()
        await asyncio.gather(*self._joining, return_exceptions=True)
        links, self._links = list(self._links.values()), {}
        for link in links:
            await self._close(link, say_bye=True)
        # Those that wait for a place find that nobody waits for them.
        self._flights.clear()
        self._wake()
        for _, settled in self._ahead.values():
            settled.set()
        # A socket that were left open would hold up the context's end for ever.
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=500)

    def shutdown(self, timeout: float | None = None) -> None:
        """``AsyncLLM`` calls this from ``__del__``; :meth:`close` is the way."""
