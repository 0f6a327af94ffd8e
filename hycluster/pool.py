"""The pool as one engine core: what ``AsyncLLM`` talks to in the place of vLLM's own client.

Holds a connection to each replica of a model, sends each request to the replica that the router
chooses and gathers the outputs of all. A request whose replica is lost goes on elsewhere, behind the tokens that
it has (``hycluster/engine/carried.py``); whoever waits for it sees a pause. One that replicas die of, again and again
before it has a token of theirs, ends with ``ReplicaLost``: it must not be carried through the whole pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from zmq.utils.monitor import recv_monitor_message

from hycluster.core import ExpertLoad, ReplicaAddress, ReplicaLoad
from hycluster.directory import ReplicaReport
from hycluster.engine.carried import carry
from hycluster.engine.protocol import EngineInfo
from hycluster.errors import ReplicaLost, Unavailable
from hycluster.observe.failover import Carried
from hycluster.router import Candidate, Policy, RouteRequest
from hycluster.wire import READY, Kind, decode_info

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 60.0
# How often a request of an interactive caller may lose its replica unseen.
MOST_LOSSES = 2


@dataclass(slots=True)
class _Flight:
    """A request that has been sent and has not finished.

    Attributes:
        tokens_left: to prefill and decode on its replica.
        output: all tokens so far, whoever made them.
        losses: replicas in a row that have died with it before it had a token of theirs.
        begun: it has output of the replica that it is on.
    """

    request: EngineCoreRequest
    link: _Link
    tokens_left: int
    output: list[int]
    losses: int
    begun: bool = False


@dataclass(slots=True, eq=False)
class _Link:
    """The connection to one replica."""

    address: ReplicaAddress
    requests: zmq.asyncio.Socket
    outputs: zmq.asyncio.Socket
    monitor: zmq.asyncio.Socket
    info: EngineInfo
    slot: int
    accepting: bool = True
    load: ReplicaLoad | None = None
    outstanding_tokens: int = 0
    # Its last word, or when it was first expected to say one.
    heard_s: float = field(default_factory=time.monotonic)
    flights: dict[str, _Flight] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class PoolClient:
    """Stands where ``AsyncLLM`` expects its engine-core client. Lives on one event loop.

    Args:
        replicas: size of the pool, for the metrics' labels.
        losses: replicas in a row that a request may lose before it has a token of theirs.
        wait_s: how long a request whose replica was lost waits for another one.
        on_lost: told of each request that ends because its replica was lost; ``ReplicaLost`` if it died.

    Attributes:
        gateway_id: random; tells this gateway's load from that of others.
        carried: what the loss of replicas has cost.
        first_replica: set once there has been a replica to send to.
        resources: what ``AsyncLLM`` reads of its client's state; a pool as such never dies.
    """

    def __init__(
        self,
        model: str,
        policy: Policy,
        gateway_id: str,
        *,
        replicas: int,
        losses: int,
        wait_s: float,
        on_lost: Callable[[str, Unavailable], Awaitable[None]],
    ) -> None:
        self.model = model
        self.gateway_id = gateway_id
        self.carried = Carried()
        self._on_lost = on_lost
        self._most_losses = losses
        self._wait_s = wait_s
        # Set, and replaced, whenever a replica joins.
        self._joined = asyncio.Event()
        self._slots = replicas
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = [0]
        self._policy = policy
        self._context = zmq.asyncio.Context()
        self._links: dict[str, _Link] = {}
        self._connecting: set[str] = set()
        self._flights: dict[str, _Flight] = {}
        self._arrived: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._next_call = 1
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        self._tasks: set[asyncio.Task[None]] = set()
        self.first_replica = asyncio.Event()

    # -- the pool's members -------------------------------------------------------------------------

    async def update(self, reports: Iterable[ReplicaReport]) -> None:
        """Connect to replicas that are new, take the loads of those that are known."""
        reports = list(reports)
        for report in reports:
            link = self._links.get(report.address.replica_id)
            if link is not None:
                link.load, link.accepting = report.load, report.accepting
        new = [r.address for r in reports if r.accepting and r.address.replica_id not in self._links]
        await asyncio.gather(*(self._connect(a) for a in new if a.replica_id not in self._connecting))

    async def _connect(self, address: ReplicaAddress) -> None:
        self._connecting.add(address.replica_id)
        identity = secrets.token_bytes(16)
        requests, outputs = (self._socket(identity) for _ in range(2))
        monitor = outputs.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        link = None
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                # Say hello only when the other side knows our identity for outputs: none may go astray.
                outputs.connect(address.outputs)
                if (await recv_monitor_message(monitor))["event"] != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    raise ConnectionError(f"{address.outputs} does not answer")
                requests.connect(address.requests)
                await requests.send_multipart([Kind.HELLO, address.token.encode()])
                answer, payload = await requests.recv_multipart()
            if answer != READY:
                raise ConnectionError(payload.decode(errors="replace"))
            link = _Link(address, requests, outputs, monitor, decode_info(payload), self._free_slot())
        except (TimeoutError, ConnectionError, OSError, zmq.ZMQError) as error:
            # The directory may still name a replica that has just died; its next word decides.
            logger.warning("no connection to replica %s: %s", address.replica_id, error or "timed out")
            return
        finally:
            self._connecting.discard(address.replica_id)
            if link is None:
                _close_sockets(monitor, requests, outputs)
        self._links[address.replica_id] = link
        self.first_replica.set()
        self._joined.set()
        self._joined = asyncio.Event()
        link.tasks = [asyncio.create_task(end(link)) for end in (self._read, self._watch, self._heed)]

    def _free_slot(self) -> int:
        """The number by which metrics tell replicas apart; a replacement takes over its predecessor's."""
        taken = {link.slot for link in self._links.values()}
        return next((slot for slot in range(self._slots) if slot not in taken), 0)

    def _socket(self, identity: bytes) -> zmq.asyncio.Socket:
        sock = self._context.socket(zmq.DEALER)
        sock.setsockopt(zmq.IDENTITY, identity)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.SNDHWM, 0)
        sock.setsockopt(zmq.RCVHWM, 0)
        # A replica that comes back is a new one, with a new address.
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        sock.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        return sock

    async def _watch(self, link: _Link) -> None:
        await recv_monitor_message(link.monitor)
        # The last words of a replica that has drained are whole answers: what has arrived is read first.
        while await link.outputs.poll(0):  # noqa: ASYNC110 - sockets tell nobody that they are empty
            await asyncio.sleep(0.005)
        self._lost(link, "its connection closed")

    async def _heed(self, link: _Link) -> None:
        """A replica that took this gateway for gone refuses whatever it says, and sends no more outputs."""
        _, *reason = await link.requests.recv_multipart()
        self._lost(link, b" ".join(reason).decode(errors="replace"), died=False)

    def _lost(self, link: _Link, why: str, *, died: bool = True) -> None:
        if self._links.get(link.address.replica_id) is not link:
            return
        logger.warning("replica %s lost: %s; %d requests on it", link.address.replica_id, why, len(link.flights))
        del self._links[link.address.replica_id]
        flights = list(link.flights.values())
        link.flights.clear()
        self._spawn(self._close(link, say_bye=False))
        for flight in flights:
            self.carried.lost(flight.request.request_id, link.heard_s)
            # One that drains ends on purpose.
            self._spawn(self._carry_over(flight, died=died and link.accepting))

    async def _carry_over(self, flight: _Flight, *, died: bool) -> None:
        """Go on elsewhere, behind the tokens so far. One that replicas die of again and again ends."""
        request_id = flight.request.request_id
        losses = 0 if flight.begun else flight.losses + died
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                # Else it was aborted meanwhile.
                while losses <= self._most_losses and self._flights.get(request_id) is flight:
                    joined = self._joined
                    try:
                        await self._send(flight.request, flight.output, losses)
                        prompt = len(flight.request.prompt_token_ids or ())
                        self.carried.moved(prompt + len(flight.output) if flight.begun else 0)
                        return
                    except Unavailable:
                        await joined.wait()
        if self._flights.get(request_id) is flight:
            del self._flights[request_id]
            self.carried.ended(request_id)
            kind = ReplicaLost if died else Unavailable
            await self._on_lost(request_id, kind("the replica that ran this request was lost"))

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
    def requests_in_flight(self) -> int:
        return len(self._flights)

    def _choose(self, request: EngineCoreRequest, tokens: int) -> _Link:
        candidates = [
            Candidate(
                replica_id=link.address.replica_id,
                own_tokens=link.outstanding_tokens,
                own_requests=len(link.flights),
                load=link.load,
            )
            for link in self._links.values()
            if link.accepting
        ]
        if not candidates:
            raise Unavailable(f"model: no replica of {self.model!r} can serve now", retry_after_s=1.0)
        if len(candidates) == 1:
            return self._links[candidates[0].replica_id]
        route = RouteRequest(tokens=tokens, session_id=request.session_id)
        return self._links[self._policy.choose(candidates, route)]

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Send a request to the replica that the router chooses.

        Raises:
            Unavailable: no replica can serve.
        """
        await self._send(request, [], losses=0)

    async def _send(self, request: EngineCoreRequest, output: list[int], losses: int) -> None:
        params = request.sampling_params
        prompt = len(request.prompt_token_ids or ())
        tokens = prompt + ((params.max_tokens or 0) if params is not None else 0)
        link = self._choose(request, tokens)
        if not link.flights:
            # It had nothing to say so far.
            link.heard_s = time.monotonic()
        flight = _Flight(request, link, tokens, output, losses)
        self._flights[request.request_id] = link.flights[request.request_id] = flight
        link.outstanding_tokens += tokens
        await link.requests.send_multipart([Kind.ADD, *self._encoder.encode(carry(request, output))], copy=False)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        by_link: dict[str, list[str]] = {}
        for request_id in request_ids:
            flight = self._flights.get(request_id)
            if flight is not None:
                by_link.setdefault(flight.link.address.replica_id, []).append(request_id)
                self._landed(flight)
        for replica_id, ids in by_link.items():
            link = self._links.get(replica_id)
            if link is not None:
                await link.requests.send_multipart([Kind.ABORT, msgspec.msgpack.encode(ids)])

    def _landed(self, flight: _Flight) -> None:
        request_id = flight.request.request_id
        self._flights.pop(request_id, None)
        self.carried.ended(request_id)
        flight.link.flights.pop(request_id, None)
        flight.link.outstanding_tokens -= flight.tokens_left

    async def _read(self, link: _Link) -> None:
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
            spent = 0
            for output in outputs.outputs:
                flight = flights.get(output.request_id)
                if flight is None:
                    continue
                if output.finish_reason is not None:
                    self._landed(flight)
                    continue
                step = len(output.new_token_ids)
                if not flight.begun:
                    flight.begun = True
                    self.carried.went_on(output.request_id)
                    step += len(flight.request.prompt_token_ids or ()) + len(flight.output)
                flight.output += output.new_token_ids
                flight.tokens_left -= step
                spent += step
            link.outstanding_tokens -= spent
            outputs.engine_index = link.slot
            if outputs.outputs or outputs.scheduler_stats is not None:
                self._arrived.put_nowait(outputs)

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._arrived.get()

    # -- control ------------------------------------------------------------------------------------

    async def _call(self, link: _Link, method: str, *arguments: Any) -> Any:
        call_id, self._next_call = self._next_call, self._next_call + 1
        future = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            await link.requests.send_multipart([Kind.CALL, *self._encoder.encode((call_id, method, arguments))])
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await future
        finally:
            self._calls.pop(call_id, None)

    def _answer(self, output: Any) -> None:
        future = self._calls.get(output.call_id)
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

    async def reset_prefix_cache_async(self, reset_running: bool = False, reset_connector: bool = False) -> bool:
        return all(await self.call_all("reset_prefix_cache", reset_running, reset_connector))

    async def reset_mm_cache_async(self) -> None:
        await self.call_all("reset_mm_cache")

    async def reset_encoder_cache_async(self) -> None:
        await self.call_all("reset_encoder_cache")

    async def pause_scheduler_async(self, mode: str = "abort", clear_cache: bool = True) -> None:
        await self.call_all("pause_scheduler", mode, clear_cache)

    async def resume_scheduler_async(self) -> None:
        await self.call_all("resume_scheduler")

    async def is_scheduler_paused_async(self) -> bool:
        return all(await self.call_all("is_scheduler_paused"))

    async def sleep_async(self, level: int = 1, mode: str = "abort") -> None:
        await self.call_all("sleep", level, mode)

    async def wake_up_async(self, tags: list[str] | None = None) -> bool:
        return all(await self.call_all("wake_up", tags))

    async def is_sleeping_async(self) -> bool:
        return all(await self.call_all("is_sleeping"))

    async def profile_async(self, is_start: bool = True, *arguments: Any) -> None:
        await self.call_all("profile", is_start, *arguments)

    async def add_lora_async(self, lora_request: Any) -> bool:
        return all(await self.call_all("add_lora", lora_request))

    async def remove_lora_async(self, lora_id: int) -> bool:
        return all(await self.call_all("remove_lora", lora_id))

    async def list_loras_async(self) -> set[int]:
        return set.intersection(*(set(ids) for ids in await self.call_all("list_loras")))

    async def pin_lora_async(self, lora_id: int) -> bool:
        return all(await self.call_all("pin_lora", lora_id))

    def dp_engines_running(self) -> bool:
        return bool(self._flights)

    def get_kv_event_sources(self) -> dict[int, Any]:
        return {}

    # -- the end ------------------------------------------------------------------------------------

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close(self, link: _Link, *, say_bye: bool) -> None:
        current = asyncio.current_task()
        for task in link.tasks:
            if task is not current:
                task.cancel()
        for task in link.tasks:
            if task is not current:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if say_bye:
            await link.requests.send_multipart([Kind.BYE])
        _close_sockets(link.monitor, link.requests, link.outputs, linger_ms=500 if say_bye else 0)

    async def close(self) -> None:
        """Say goodbye to every replica; what is still in flight there is dropped."""
        links, self._links = list(self._links.values()), {}
        for link in links:
            await self._close(link, say_bye=True)
        # A socket that were left open would hold up the context's end for ever.
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=500)

    def shutdown(self, timeout: float | None = None) -> None:
        """``AsyncLLM`` calls this from ``__del__``; :meth:`close` is the way."""


def _close_sockets(
    monitor: zmq.asyncio.Socket, requests: zmq.asyncio.Socket, outputs: zmq.asyncio.Socket, *, linger_ms: int = 0
) -> None:
    outputs.disable_monitor()
    monitor.close(linger=0)
    requests.close(linger=linger_ms)
    outputs.close(linger=linger_ms)
