"""``hycluster chaos`` against a served cluster of simulated engines: it hits, it compares, and it can fail."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import ray

from tests.families import words_below
from tests.integration.conftest import SIMULATED, Served, eventually, replicas

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_rays_table_has_what_targets_are_found_by(served: Served) -> None:
    from hycluster.chaos.schedule import Where
    from hycluster.chaos.targets import Targets

    targets = Targets(f"replica-{SIMULATED}")
    try:
        eventually(lambda: len(targets.find(Where.REPLICA)) == 2, 60, "both replicas are there")
        (ingress,) = targets.find(Where.INGRESS)
        (executor,) = targets.find(Where.BATCH)
        below = {process.pid for process in words_below(served.process.pid)}
        for target in (*targets.find(Where.REPLICA), ingress, executor):
            assert target.pid in below
            assert targets.lives(target)
            (process,) = targets.processes(target)
            assert (process.pid, process.node_id) == (target.pid, target.node_id)
        ports = [int(address.rpartition(":")[2]) for address in (served.http, served.grpc)]
        assert targets.listening(ports) == [ingress]
        assert targets.listening([*ports, 1]) == []
    finally:
        targets.close()


def chaos(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, figures and what was said meanwhile."""
    command = [sys.executable, "-m", "hycluster", "chaos", "--model", SIMULATED, "--json", "--yes", *arguments]
    # Simulated engines have no logprobs.
    done = subprocess.run(
        [*command, "--leave-out", "logprobs", "--output-tokens", "4-40", "--concurrency", "8", "--patience-s", "60"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def test_replicas_are_killed_and_every_answer_is_the_undisturbed_one(served: Served) -> None:
    eventually(lambda: len(replicas(SIMULATED)) == 2, 60, "both replicas are there")
    before = {replica.address.replica_id for replica in replicas(SIMULATED)}
    code, found, said = chaos("--streams", "24", "--count", "3", "--faults", "kill=2,delay=1", "--delay-s", "0.2")
    assert (code, found["failures"], found["wrong"], found["reference_failures"]) == (0, [], [], []), said
    assert found["well"]
    assert found["requests"] >= 24
    assert found["exact_requests"] > 12
    assert found["faults"] == {"kill replica": 2, "delay replica": 1}
    assert found["streams_at_fault"] > 0
    assert found["migrated"]["requests"] > 0
    assert found["migrated"]["tokens_recomputed"] > 0
    assert found["whole_after_s"]["kill replica"]["max"] > found["whole_after_s"]["delay replica"]["max"] >= 0.2
    assert said.count("whole again after") == 3
    after = {replica.address.replica_id for replica in replicas(SIMULATED) if replica.accepting}
    assert len(after) >= 2
    assert after - before, "nobody was killed"


class Meddler:
    """A proxy before the HTTP ingress that changes the first token id of every chunk after so many requests."""

    def __init__(self, target: str, honest: int) -> None:
        self._host, _, self._port = target.removeprefix("http://").rpartition(":")
        self._honest = honest
        self._serving: set[asyncio.Task[None] | None] = set()
        self._opened: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        self.port, self._loop, self._closing = self._opened.result(60)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    async def _run(self) -> None:
        closing = asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._opened.set_result((server.sockets[0].getsockname()[1], asyncio.get_running_loop(), closing))
        await closing.wait()
        server.close()

    async def _serve(self, caller: asyncio.StreamReader, to_caller: asyncio.StreamWriter) -> None:
        # The loop itself would let go of it.
        self._serving.add(asyncio.current_task())
        from_ingress, to_ingress = await asyncio.open_connection(self._host, int(self._port))
        # A connection is a request: the tool keeps none open.
        begun = await caller.read(1 << 16)
        if begun.startswith(b"POST"):
            self._honest -= 1
        meddle = begun.startswith(b"POST") and self._honest < 0
        to_ingress.write(begun)
        rest = asyncio.create_task(self._pass_on(caller, to_ingress))
        try:
            while chunk := await from_ingress.read(1 << 16):
                # A digit for a digit, so that all lengths stay right.
                to_caller.write(re.sub(rb'("token_ids":\[)\d', rb"\g<1>9", chunk) if meddle else chunk)
                await to_caller.drain()
        finally:
            rest.cancel()
            to_caller.close()
            to_ingress.close()

    @staticmethod
    async def _pass_on(caller: asyncio.StreamReader, to_ingress: asyncio.StreamWriter) -> None:
        while chunk := await caller.read(1 << 16):
            to_ingress.write(chunk)
        to_ingress.close()


@pytest.fixture
def meddler(served: Served) -> Iterator[Meddler]:
    proxy = Meddler(served.http, honest=8)
    yield proxy
    proxy.close()


def test_a_wrong_answer_is_noticed(served: Served, meddler: Meddler) -> None:
    eventually(lambda: len(replicas(SIMULATED)) == 2, 60, "both replicas are there")
    code, found, said = chaos(
        *("--streams", "8", "--count", "0", "--ingress", "http"), *("--http", f"http://127.0.0.1:{meddler.port}")
    )
    assert code == 1, said
    assert (found["requests"], found["failures"]) == (8, [])
    # Of an unseeded answer nobody can say that a token is wrong.
    assert len(found["wrong"]) == found["exact_requests"] > 0
    assert all("undisturbed" in line for line in found["wrong"])
    assert not found["well"]
