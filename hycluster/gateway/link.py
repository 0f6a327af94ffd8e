"""A gateway's side of one replica: sends and reads, and keeps the books on what is on its way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason, UtilityOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from zmq.utils.monitor import recv_monitor_message

from hycluster.core import ReplicaLoad
from hycluster.engine.block_changes import is_changes
from hycluster.engine.protocol import EngineInfo
from hycluster.errors import InvalidInput, Unavailable
from hycluster.gateway.bulk import EngineRoom
from hycluster.gateway.connection import ReplicaConnection
from hycluster.gateway.failover import Failover
from hycluster.gateway.flight import Flight
from hycluster.gateway.output_reader import OutputReader
from hycluster.gateway.prefixes import Prefixes
from hycluster.gateway.sent_work import OUTSTANDING, SentWork, work_of_others
from hycluster.gateway.tasks import Tasks
from hycluster.observe.gateways import KnownReplica, ReplicaBooks
from hycluster.replica.frames import in_pieces
from hycluster.replica.wire import MessageKind
from hycluster.timeline import Track

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 60.0


class Link:
    """The connection to one replica while it lasts. Reads from the start; ends by itself when the replica is lost.

    Args:
        arrived: gets what comes for callers, as it comes.
        failover: hears of each request that ends here, or has to go on elsewhere.
        on_lost: told when the replica is lost, before ``failover`` hears of its requests.
        prefixes: told what becomes of its KV blocks, if the connection follows them.
        gateway_id: this gateway's key in what a replica says of gateways.

    Attributes:
        known: what stays of it when it is gone; its number is what outputs carry.
        accepting: it takes new requests.
        load: as its last report says; take one by :meth:`note`.
        room: how many rows of bulk it can use, by its reports.
        bulk_rows: requests of bulk priority that it has of this gateway.
        outstanding_tokens: to prefill or decode there for this gateway.
        work: the same, told apart by what is to be done.
        others: that of other gateways, as its last report says.
        worked_off_tokens: how much less that is for what the replica did, or because requests ended; only grows.
        heard_s: on the monotonic clock, its last word, or when it was first expected to say one.
        progress_s: the same of the last tokens that came; before any, minus infinity.
        flights: by the id that its engine knows them by.
    """

    def __init__(
        self,
        connection: ReplicaConnection,
        known: KnownReplica,
        arrived: asyncio.Queue[EngineCoreOutputs],
        failover: Failover,
        on_lost: Callable[[Link], None],
        prefixes: Prefixes | None = None,
        gateway_id: str = "",
    ) -> None:
        self.known = known
        self.replica_id = connection.address.replica_id
        self.accepting = True
        self.load: ReplicaLoad | None = None
        self.room = EngineRoom()
        self.bulk_rows = 0
        self.work = SentWork()
        self.others = work_of_others(None, gateway_id)
        self.worked_off_tokens = 0
        self.heard_s = time.monotonic()
        self.progress_s = -math.inf
        self.flights: dict[str, Flight] = {}
        self._connection = connection
        self._arrived = arrived
        self._failover = failover
        self._on_lost = on_lost
        self._prefixes = prefixes
        self._gateway_id = gateway_id
        self._gone = False
        self._next_call = 0
        self._calls: dict[int, asyncio.Future[Any]] = {}
        # Calls that went ahead of a request: by what name the engine knows it, and set when they are answered.
        self._ahead: dict[int, tuple[str, asyncio.Event]] = {}
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        self._tasks = Tasks()
        self._reader = OutputReader(connection.outputs, self._hear)
        for end in (self._watch, self._heed):
            self._tasks.spawn(end())

    @property
    def outstanding_tokens(self) -> int:
        return int(self.work.row[OUTSTANDING])

    @property
    def info(self) -> EngineInfo:
        return self._connection.info

    @property
    def books(self) -> ReplicaBooks:
        """As they are now."""
        silent_s = time.monotonic() - self.heard_s if self.flights else 0.0
        return ReplicaBooks(self.replica_id, len(self.flights), self.outstanding_tokens, silent_s)

    @property
    def has_suspect(self) -> bool:
        """One of its requests may be what replicas die of."""
        return any(flight.suspected for flight in self.flights.values())

    # -- sending ------------------------------------------------------------------------------------

    async def send(self, flight: Flight, message: Sequence[Any]) -> None:
        """Have the replica compute a request, whose message this is."""
        if not self.flights:
            self.heard_s = time.monotonic()
        flight.sent(self.replica_id)
        self.flights[flight.engine_id] = flight
        self.work.row[OUTSTANDING] += flight.tokens_left
        self.work.add(flight)
        self.bulk_rows += flight.bulk
        self.known.routed += 1
        if flight.deaths:
            await self._send_carefully(flight, message)
        else:
            await self._tell(MessageKind.ADD, *message)

    async def _send_carefully(self, flight: Flight, message: Sequence[Any]) -> None:
        # As it is now: a message that can't be sent ends the link, and the request goes on elsewhere.
        engine_id, suspected = flight.engine_id, flight.suspected
        # Ahead of it goes a call: if that is answered, its engine was there to get it.
        call_id, answered = self._call_id(), asyncio.Event()
        self._ahead[call_id] = engine_id, answered
        await self._tell_call(call_id, "get_supported_tasks")
        if suspected:
            # An engine that dies of it at once must not take the answer along.
            self._tasks.spawn(self._send_behind(answered, engine_id, message))
        elif engine_id in self.flights:
            await self._tell(MessageKind.ADD, *message)

    async def _send_behind(self, answered: asyncio.Event, engine_id: str, message: Sequence[Any]) -> None:
        await answered.wait()
        # Else it was aborted meanwhile.
        if engine_id in self.flights:
            await self._tell(MessageKind.ADD, *message)

    async def abort(self, engine_ids: list[str]) -> None:
        """Have the replica's engine drop these requests."""
        await self._tell(MessageKind.ABORT, msgspec.msgpack.encode(engine_ids))

    async def _tell(self, *frames: Any) -> None:
        """Send without waiting: a socket takes all there is, unless its replica has gone."""
        if self._gone:
            return
        try:
            await self._connection.requests.send_multipart(in_pieces(frames), flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self.lose("its connection closed")

    # -- the books ----------------------------------------------------------------------------------

    def note(self, load: ReplicaLoad) -> None:
        """Take a report of the replica's."""
        self.load = load
        if self._prefixes is not None:
            self.others = work_of_others(load, self._gateway_id)
        self.room.note(load, self.bulk_rows, time.monotonic())

    def drop(self, flight: Flight) -> None:
        """It is not here any more."""
        del self.flights[flight.engine_id]
        self.bulk_rows -= flight.bulk
        self.work.drop(flight)
        self._work_off(flight.tokens_left)
        if self._prefixes is not None and flight.prefix is not None:
            self._prefixes.let_go(flight.prefix)

    def _work_off(self, tokens: int) -> None:
        self.work.row[OUTSTANDING] -= tokens
        self.worked_off_tokens += tokens

    # -- reading ------------------------------------------------------------------------------------

    def _hear(self, frames: list[zmq.Frame]) -> None:
        if len(frames) == 1 and not len(frames[0].buffer):
            self.lose("its engine ended")
            return
        self.heard_s = time.monotonic()
        if self._prefixes is not None:
            self._hear_blocks(self._prefixes, frames)
            if not frames:
                return
        outputs: EngineCoreOutputs = self._decoder.decode(frames)
        if outputs.utility_output is not None:
            self._answer(outputs.utility_output)
            return
        outputs.outputs, bulk = self._book(outputs)
        outputs.engine_index = self.known.source(bulk=False)
        if outputs.outputs or outputs.scheduler_stats is not None:
            self._arrived.put_nowait(outputs)
        if bulk:
            # As if they were another engine's, so that they are counted apart.
            apart = EngineCoreOutputs(
                engine_index=self.known.source(bulk=True), outputs=bulk, timestamp=outputs.timestamp,
                weight_version=outputs.weight_version,
            )  # fmt: skip
            self._arrived.put_nowait(apart)

    def _hear_blocks(self, prefixes: Prefixes, frames: list[zmq.Frame]) -> None:
        """Take away what a message says of KV blocks; before its outputs are told, as they may be asked for at once."""
        while frames and is_changes(frames[0].buffer):
            frame = frames.pop(0).buffer
            if not self._gone:
                prefixes.hear(self.replica_id, self.info, frame)

    def _book(self, outputs: EngineCoreOutputs) -> tuple[list[EngineCoreOutput], list[EngineCoreOutput]]:
        """Those of a step's outputs that somebody waits for, under the ids that their callers gave them: of online
        requests, and of batch work."""
        flights, failover = self.flights, self._failover
        spent = 0
        online, bulk = list[EngineCoreOutput](), list[EngineCoreOutput]()
        for output in outputs.outputs:
            flight = flights.get(output.request_id)
            if flight is None:
                # Aborted, or gone on elsewhere.
                continue
            if output.finish_reason is FinishReason.ABORT:
                # Not by its caller, so by a replica that ends: it goes on elsewhere.
                self.accepting = False
                self.drop(flight)
                failover.gave_back(flight, self.heard_s)
                continue
            if output.finish_reason is FinishReason.ERROR and isinstance(output.stop_reason, str):
                # vLLM says so of no error: its engine knows what is wrong with the request itself.
                self.drop(flight)
                failover.refused(flight, InvalidInput(output.stop_reason))
                continue
            output.request_id = flight.request_id
            (bulk if flight.bulk else online).append(output)
            if flight.track is not None and (output.events or output.finish_reason is not None or not flight.begun):
                self._note_on(flight.track, flight, output, outputs.timestamp)
            if self._prefixes is not None and flight.prefix is not None and not flight.begun:
                self._prefixes.begun(flight.prefix, output.prefill_stats)
            if flight.moves and not flight.begun:
                failover.migrated.went_on(flight.request_id)
            if output.finish_reason is not None:
                self.drop(flight)
                failover.landed(flight)
                continue
            self.work.take(flight, len(output.new_token_ids))
            spent += flight.take(output.new_token_ids)
            if flight.deaths and not flight.suspected:
                failover.wake()
        if spent:
            self.progress_s = self.heard_s
        self._work_off(spent)
        return online, bulk

    def _note_on(self, track: Track, flight: Flight, output: EngineCoreOutput, engine_s: float) -> None:
        track.heard(engine_s, self.heard_s, output.events)
        if output.prefill_stats is not None:
            track.cached_tokens = output.prefill_stats.num_cached_tokens
        if output.trace_headers is not None:
            track.aside(output.trace_headers)
        if output.finish_reason is not None:
            track.output_tokens = flight.output_tokens + len(output.new_token_ids)
            track.end(str(output.finish_reason))

    async def _watch(self) -> None:
        await recv_monitor_message(self._connection.monitor)
        # The last words of a replica that has drained are whole answers: what has arrived is read first.
        try:
            while self._reader.read():  # noqa: ASYNC110 - sockets tell nobody that they are empty
                await asyncio.sleep(0)
        finally:
            self.lose("its connection closed")

    async def _heed(self) -> None:
        """A replica that took this gateway for gone refuses whatever it says, and sends no more outputs."""
        _, *reason = await self._connection.requests.recv_multipart()
        self.lose(b" ".join(reason).decode(errors="replace"), died=False)

    # -- control calls ------------------------------------------------------------------------------

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a control method of the replica's engine.

        Raises:
            Unavailable: the replica was lost before it answered.
            RuntimeError: what the engine says against it.
            TimeoutError: no answer for ``CALL_TIMEOUT_S``.
        """
        if self._gone:
            raise _lost_before_it_answered()
        call_id, answer = self._call_id(), asyncio.get_running_loop().create_future()
        self._calls[call_id] = answer
        try:
            await self._tell_call(call_id, method, *arguments)
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await answer
        finally:
            del self._calls[call_id]

    def _call_id(self) -> int:
        self._next_call += 1
        return self._next_call

    async def _tell_call(self, call_id: int, method: str, *arguments: Any) -> None:
        await self._tell(MessageKind.CALL, *self._encoder.encode((call_id, method, arguments)))

    def _answer(self, output: UtilityOutput) -> None:
        if (ahead := self._ahead.pop(output.call_id, None)) is not None:
            engine_id, answered = ahead
            if (flight := self.flights.get(engine_id)) is not None:
                flight.taken = True
            answered.set()
            return
        answer = self._calls.get(output.call_id)
        if answer is None or answer.done():
            return
        if output.failure_message is not None:
            answer.set_exception(RuntimeError(output.failure_message))
        else:
            answer.set_result(output.result.result if output.result is not None else None)

    # -- the end ------------------------------------------------------------------------------------

    def lose(self, why: str, *, died: bool = True) -> None:
        """Its replica is gone: what it had goes on elsewhere."""
        if self._gone:
            return
        logger.warning("replica %s lost: %s; %d requests on it", self.replica_id, why, len(self.flights))
        self.leave()
        self.known.why = why
        self._on_lost(self)
        flights = list(self.flights.values())
        self.flights.clear()
        for flight in flights:
            # One that drains ends on purpose.
            self._failover.lost(flight, self.heard_s, died=died and self.accepting)

    def leave(self) -> None:
        """Nothing is sent any more, and the replica's loss is nobody's business."""
        self._gone = True
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(_lost_before_it_answered())

    async def close(self, *, say_bye: bool = False) -> None:
        """End a link that is lost or left; ``say_bye`` tells the replica, which drops what it has."""
        self._reader.close()
        await self._tasks.cancel()
        if say_bye:
            # Else it has gone.
            with contextlib.suppress(zmq.Again):
                await self._connection.requests.send_multipart([MessageKind.BYE], flags=zmq.NOBLOCK, copy=False)
        self._connection.close(linger_ms=500 if say_bye else 0)


def _lost_before_it_answered() -> Unavailable:
    return Unavailable("the replica was lost before it answered", retry_after_s=1.0)
