"""What encryption of the data plane costs, on the wire alone: CPU time and pace of an engine's outputs.

    python -m bench.wire [--messages 20000] [--rounds 5]

A stand-in for the engine says messages of a step's size as fast as they go, over the replica's real sockets to a
gateway's sockets in another process. The kinds take turns, round after round. CPU time is that of both processes, all
threads, and what noise of the machine there is hits wall time more than it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import queue
import resource
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import zmq.asyncio

from hycluster.core import ReplicaLoad
from hycluster.engine.protocol import EngineInfo, Frame
from hycluster.gateway.connection import connect
from hycluster.gateway.output_reader import OutputReader
from hycluster.replica.wire import EngineServer, MessageKind
from hycluster.settings.load import DataPlane

# One step's outputs: of one stream, of 64, of 512.
SIZES = {"1 stream": 150, "64 streams": 6_000, "512 streams": 48_000}
KINDS = {"encrypted": True, "not encrypted": False}


class StandInEngine:
    """Says what it was told to, as often as it was told to."""

    info = EngineInfo(max_model_len=1, kv_tokens=1, block_size=1)
    error: BaseException | None = None

    def __init__(self) -> None:
        self._said: queue.Queue[tuple[int, Sequence[Frame]] | None] = queue.Queue()

    def add(self, client: int, frames: Sequence[Frame]) -> None:
        size, count = json.loads(bytes(frames[0]))
        for _ in range(count):
            self._said.put((client, [bytes(size)]))

    def abort(self, client: int, request_ids: list[str]) -> None: ...
    def abort_client(self, client: int) -> None: ...
    def call(self, client: int, call_id: int, method: str, arguments: list[Any]) -> None: ...
    def hear(self, frames: Sequence[Frame]) -> None: ...

    def load(self) -> ReplicaLoad:
        return ReplicaLoad()

    def probe(self) -> None: ...

    def next_output(self) -> tuple[int, Sequence[Frame]] | None:
        return self._said.get()

    def shutdown(self) -> None:
        self._said.put(None)


def replica(encrypted: bool, say: Connection) -> None:
    """A process of its own; answers each word with the CPU time that it has taken."""
    engine: Any = StandInEngine()
    ports = DataPlane(host="127.0.0.1", encrypted=encrypted)
    server = EngineServer(engine, replica_id="r", model="m", host="127.0.0.1", ports=ports)
    say.send(server.address)
    while say.recv():
        say.send(cpu_s())
    engine.shutdown()
    server.close()


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def measure(pipes: dict[str, Connection], messages: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """By kind and size: microseconds of CPU a message, messages a second, microseconds of a round trip."""
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    context = zmq.asyncio.Context()
    links = {kind: await connect(context, pipe.recv()) for kind, pipe in pipes.items()}

    def used(kind: str) -> float:
        pipes[kind].send(True)
        return cpu_s() + float(pipes[kind].recv())

    heard = asyncio.Semaphore(0)
    readers = [OutputReader(link.outputs, lambda _: heard.release()) for link in links.values()]

    async def ask(kind: str, size: int, count: int) -> None:
        word = json.dumps([size, count]).encode()
        await links[kind].requests.send_multipart([MessageKind.ADD, word])
        for _ in range(count):
            await heard.acquire()

    for _ in range(rounds):
        for name, size in SIZES.items():
            for kind in links:
                before, begun = used(kind), time.perf_counter()
                await ask(kind, size, messages)
                took = time.perf_counter() - begun
                cpu = used(kind) - before
                begun = time.perf_counter()
                for _ in range(200):
                    await ask(kind, size, 1)
                trip = (time.perf_counter() - begun) / 200
                found.setdefault((kind, name), []).append((cpu / messages * 1e6, messages / took, trip * 1e6))
    for reader in readers:
        reader.close()
    for kind, link in links.items():
        link.close()
        pipes[kind].send(False)
    context.destroy(linger=0)
    return {
        kind: {
            name: dict(
                zip(
                    ("cpu_us", "messages_per_s", "round_trip_us"),
                    (round(statistics.median(column), 1) for column in zip(*found[kind, name], strict=True)),
                    strict=True,
                )
            )
            for name in SIZES
        }
        for kind in links
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    wish = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for kind, encrypted in KINDS.items():
        pipes[kind], far = spawn.Pipe()
        processes.append(spawn.Process(target=replica, args=(encrypted, far), daemon=True))
        processes[-1].start()
    for kind, sizes in asyncio.run(measure(pipes, wish.messages, wish.rounds)).items():
        for name, figures in sizes.items():
            print(f"{kind}, {name}: {json.dumps(figures)}")
    for process in processes:
        process.join(10)


if __name__ == "__main__":
    main()
