"""Replicas without Ray and vLLM: simulated engines behind real sockets on loopback, and what they would generate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace, TracebackType
from typing import Any, Self

from hycluster.adapters import AdapterEntry
from hycluster.core import BulkDemand, ColocationLoad, GatewayWork, Priority, ReplicaAddress, ReplicaLoad
from hycluster.directory.directory import Demand, Directory, ReplicaReport
from hycluster.engine import messages
from hycluster.engine.simulated import SimulatedEngine
from hycluster.engine.timing import SimulatedScheduler
from hycluster.replica.wire import EngineServer
from hycluster.settings.load import DataPlane
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated

LOOPBACK = DataPlane(host="127.0.0.1")


class ColocatedEngine(SimulatedEngine):
    """Says of its bulk rows what a real engine does, though it schedules as before.

    Attributes:
        parked: how many of its running bulk rows it says are parked.
    """

    parked = 0

    def load(self) -> ReplicaLoad:
        with self._changed:
            scheduler = self._scheduler
            running, waiting = (
                sum(stream.order[0] >= Priority.BATCH for stream in streams)
                for streams in (scheduler._running, scheduler._waiting)
            )
            said = ColocationLoad(parked=min(self.parked, running), bulk_running=running, bulk_waiting=waiting)
            return replace(scheduler.load(), colocation=said)


class SimulatedReplica:
    """One engine and its sockets."""

    def __init__(
        self,
        settings: Simulated,
        replica_id: str = "r0",
        model: str = "tiny",
        kind: type[SimulatedEngine] = SimulatedEngine,
        ports: DataPlane = LOOPBACK,
    ) -> None:
        self.engine = kind(settings)
        self.server = EngineServer(self.engine, replica_id=replica_id, model=model, host=ports.host or "", ports=ports)
        self.accepting = True

    @property
    def address(self) -> ReplicaAddress:
        return self.server.address

    @property
    def report(self) -> ReplicaReport:
        return ReplicaReport(self.address, self.engine.load(), self.accepting)

    @property
    def requests(self) -> int:
        load = self.engine.load()
        return load.running + load.waiting

    def die(self) -> None:
        """As when the process is killed: its gateways find out by themselves."""
        self.engine.kill(RuntimeError("killed"))

    def close(self) -> None:
        self.engine.shutdown()
        self.server.close()


class SimulatedPool:
    """Replicas that differ in nothing but their ids."""

    def __init__(self, settings: Simulated, replicas: int, kind: type[SimulatedEngine] = SimulatedEngine) -> None:
        self.settings = settings
        self.kind = kind
        self.replicas: list[SimulatedReplica] = []
        for _ in range(replicas):
            self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for replica in self.replicas:
            replica.close()

    def __getitem__(self, index: int) -> SimulatedReplica:
        return self.replicas[index]

    def start(self) -> SimulatedReplica:
        """One more."""
        self.replicas.append(SimulatedReplica(self.settings, f"r{len(self.replicas)}", kind=self.kind))
        return self.replicas[-1]

    @property
    def reports(self) -> list[ReplicaReport]:
        return [replica.report for replica in self.replicas]

    def directory(self, model: Model) -> Any:
        """What a gateway follows, without an actor: it knows these replicas. ``known`` is what it is made of."""
        directory = Directory()

        async def sync(
            name: str,
            gateway_id: str,
            outstanding: dict[str, int],
            adapters: dict[str, AdapterEntry],
            demand: Demand | None,
            bulk: dict[str, BulkDemand],
            shows: bool,
            work: dict[str, GatewayWork] | None,
            losses: dict[str, str],
        ) -> Any:
            for report in self.reports:
                directory.report(model, report)
            return directory.sync(name, gateway_id, outstanding, adapters, demand, bulk, shows, work, losses)

        def called(method: Callable[..., Any]) -> Any:
            # A call of an actor goes out before anybody waits for its answer.
            def remote(*arguments: Any) -> Any:
                answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                answer.set_result(method(*arguments))
                return answer

            return SimpleNamespace(remote=remote)

        mailbox = {name: called(getattr(directory, name)) for name in ("ask", "answer", "answers")}
        return SimpleNamespace(sync=SimpleNamespace(remote=sync), known=directory, **mailbox)


def predicted(prompt: list[int], max_tokens: int, settings: Simulated) -> list[int]:
    """The tokens that any simulated engine of these settings gives to this prompt, end of sequence ignored."""
    scheduler = SimulatedScheduler(settings)
    params = messages.SamplingParams(max_tokens=max_tokens)
    scheduler.add(
        0,
        messages.EngineCoreRequest(
            request_id="r", prompt_token_ids=prompt, sampling_params=params, arrival_time=time.time()
        ),
    )
    tokens: list[int] = []
    while scheduler.has_work:
        for output in scheduler.step(0.0).outputs.get(0, []):
            tokens += output.new_token_ids
    return tokens
