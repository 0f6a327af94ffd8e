"""The processes that hold the service together die under load, one after the other, on a cluster of its own: nobody
notices. Real engine (a tiny model), simulated ones, two ingress processes, callers by HTTP and gRPC.

Every answer is compared with an undisturbed one. Whatever is not killed must be the same process in the end. Last,
what the service can't do without: Ray's loss is noticed, said and ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import zmq

from bench.gateway import free_port
from hycluster.chaos.sse import event_lines
from hycluster.client import AsyncClient
from hycluster.core import Sampling
from tests.families import words_below
from tests.integration.conftest import SIMULATED, TINY, Served, launch, stop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TOKENS = 40
FLOOD = 24
# Of a stream that is in work while GCS dies: four seconds and more.
LONG = 200
# What serves; its processes outlive those of others.
BATCHES = "ServeReplica:hycluster:batches"
SERVING = ("ServeReplica:hycluster:ingress", f"replica-{SIMULATED}", f"replica-{TINY}", BATCHES)
# Ray's, which write figures and logs for people; nothing starts them again.
UNNEEDED = ("dashboard/dashboard.py", "_private/log_monitor.py", "_private/monitor.py")
CONTROLLER, DIRECTORY = "ray::ServeController", "ray::Directory"


@pytest.fixture(scope="module")
def service(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("control")
    engine = {"max_model_len": 2048, "max_num_seqs": 8}
    settings = {
        "models": [
            {
                "name": TINY,
                "source": str(tiny_model),
                "engine": engine,
                "hardware": {"cpus": 0.2, "kv_cache_gib": 0.25},
            },
            {
                "name": SIMULATED,
                "source": str(tiny_model),
                "simulated": {"step_base_s": 0.02, "max_model_len": 2048, "max_num_seqs": 8, "vocab_size": 256},
                "engine": engine,
                "hardware": {"cpus": 0.05},
                "replicas": {"min": 2, "max": 3},
                "autoscaling": {"scale_up_after_s": 1},
            },
        ],
        "http": {"port": free_port()},
        "grpc": {"port": free_port()},
        "ingress": {"replicas": 2},
        "data_plane": {"host": "127.0.0.1"},
        "batches": {"store": str(folder / "batches")},
        "drain_timeout_s": 10,
    }
    path = folder / "settings.yaml"
    path.write_text(json.dumps(settings))
    # A home of its own: the other tests' cluster stays the one that commands find.
    server = launch([str(path)], folder / "serve.log", {"HYCLUSTER_HOME": str(folder / "home")})
    try:
        yield server
    finally:
        if server.process.poll() is None:
            stop(server.process)


@dataclass
class Load:
    """Callers that ask both models by both ingresses again and again."""

    served: Served
    expected: dict[str, str] = field(default_factory=dict)
    right: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    ending: bool = False

    async def ask(self, way: str, caller: Any, model: str, tokens: int = TOKENS) -> None:
        try:
            text = await (over_http if way == "HTTP" else over_grpc)(caller, model, tokens)
        except Exception as error:
            self.wrong.append(f"{way} {model}: {error!r}")
            return
        if text == self.expected.setdefault(f"{model} {tokens}", text):
            self.right[f"{way} {model}"] += 1
        else:
            self.wrong.append(f"{way} {model}: another answer")

    async def keep_asking(self, way: str, caller: Any, model: str) -> None:
        while not self.ending:
            await self.ask(way, caller, model)

    async def more(self, count: int = 3, timeout_s: float = 60) -> None:
        """Wait until each kind of caller has had so many answers more, or one has failed."""
        before = Counter(self.right)
        kinds = [f"{way} {model}" for way in ("HTTP", "gRPC") for model in (TINY, SIMULATED)]
        await until(lambda: bool(self.wrong) or all(self.right[k] >= before[k] + count for k in kinds), timeout_s)


async def over_http(http: httpx.AsyncClient, model: str, tokens: int) -> str:
    body = {"model": model, "prompt": "x", "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        events = [line[6:] async for line in event_lines(answer) if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


async def over_grpc(caller: AsyncClient, model: str, tokens: int) -> str:
    sampling = Sampling(max_tokens=tokens, ignore_eos=True, temperature=0)
    chunks = [chunk async for chunk in caller.stream(model=model, prompt="x", sampling=sampling)]
    return "".join(output.text for chunk in chunks for output in chunk.outputs)


@asynccontextmanager
async def under_load(served: Served) -> AsyncIterator[Load]:
    """Callers of both models by both ingresses; in the end none has seen a failure."""
    load = Load(served)
    async with contextlib.AsyncExitStack() as stack:
        callers: list[tuple[str, Any]] = [
            # Several connections of each kind, so that each of the two ingress processes has some.
            *[("HTTP", await stack.enter_async_context(httpx.AsyncClient(base_url=served.http, timeout=120)))
              for _ in range(3)],
            *[("gRPC", await stack.enter_async_context(AsyncClient(served.grpc))) for _ in range(3)],
        ]  # fmt: skip
        asking = [
            asyncio.create_task(load.keep_asking(way, caller, model))
            for way, caller in callers
            for model in (TINY, SIMULATED)
        ]
        try:
            await load.more(1)
            yield load
            await load.more()
        finally:
            load.ending = True
            await asyncio.gather(*asking)
    assert load.wrong == []


def processes(served: Served, name: str) -> set[int]:
    # The raylet's later arguments name the agents.
    below = words_below(served.process.pid).items()
    return {process.pid for process, words in below if name in " ".join(words[:3])}


def serving(served: Served) -> dict[str, set[int]]:
    return {name: processes(served, name) for name in SERVING}


async def until(condition: Callable[[], bool], timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - processes tell nobody
            await asyncio.sleep(0.2)


def log_files(served: Served) -> list[Path]:
    """Serve's, of the ingress and replicas."""
    (raylet,) = [words for words in words_below(served.process.pid).values() if words[0].endswith("/raylet")]
    (socket,) = [arg.partition("=")[2] for arg in raylet if arg.startswith("--raylet_socket_name=")]
    return list(Path(socket).parents[1].glob("logs/serve/replica_*.log"))


def said(text: str, logger: str, message: str) -> bool:
    """Whether there is a warning of that logger's, in the form that log files have."""
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return any(
        (line["level"], line["logger"]) == ("warning", logger) and re.match(message, line["message"]) for line in lines
    )


async def odd_request(served: Served) -> None:
    """Something that vLLM warns of in an ingress process."""
    async with httpx.AsyncClient(base_url=served.http, timeout=60) as http:
        body = {"model": TINY, "prompt": "x", "max_tokens": 1, "temperature": 0.001}
        (await http.post("/v1/completions", json=body)).raise_for_status()


async def odd_message(served: Served) -> None:
    """From somebody whom the tiny model's replica does not know."""
    (engine,) = processes(served, f"replica-{TINY}")
    ports = {c.laddr.port for c in psutil.Process(engine).net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    with zmq.Context() as context:
        for port in ports:
            with context.socket(zmq.DEALER) as sock:
                sock.setsockopt(zmq.LINGER, 500)
                sock.connect(f"tcp://127.0.0.1:{port}")
                sock.send_multipart([b"?"])
    await asyncio.sleep(1)


def kill(served: Served, name: str) -> int:
    (pid,) = processes(served, name)
    os.kill(pid, signal.SIGKILL)
    return pid


async def killed_and_back(served: Served, name: str) -> None:
    pid = kill(served, name)
    await until(lambda: len(processes(served, name) - {pid}) == 1, 60)


def test_a_killed_controller_takes_all_replicas_over(service: Served) -> None:
    async def run() -> None:
        before = serving(service)
        begun = {path: path.stat().st_size for path in log_files(service)}
        async with under_load(service) as load:
            await killed_and_back(service, CONTROLLER)
            # It asks all replicas in its first second or two; those that it can't take over, it stops.
            await asyncio.sleep(5)
            assert serving(service) == before
            # And it is at work: what is missing is replaced, what is too little grows.
            lost = min(before[f"replica-{SIMULATED}"])
            os.kill(lost, signal.SIGKILL)
            await until(lambda: len(processes(service, f"replica-{SIMULATED}") - {lost}) == 2, 60)
            async with AsyncClient(service.grpc) as caller:
                await asyncio.gather(
                    *(load.ask("gRPC", caller, SIMULATED, 400) for _ in range(FLOOD)),
                    until(lambda: len(processes(service, f"replica-{SIMULATED}")) == 3, 90),
                )
        after = serving(service)
        del before[f"replica-{SIMULATED}"], after[f"replica-{SIMULATED}"]
        assert after == before
        await odd_request(service)
        await odd_message(service)
        # Since then, and so after all of them had started, each has written to its file what went wrong.
        new = {path.name: path.read_text()[size:] for path, size in begun.items()}
        ingresses = [text for name, text in new.items() if "_ingress_" in name]
        assert len(ingresses) == 2
        for text in ingresses:
            assert said(text, "hycluster.gateway.link", r"replica \w+ lost: its connection closed")
        assert any(said(text, "vllm.sampling_params", r"temperature .* is less than") for text in ingresses)
        (engine,) = [text for name, text in new.items() if f"_replica-{TINY}_" in name]
        assert said(engine, "hycluster.replica.peers", r"a connection without .* credentials was refused")
        (engine,) = [path.read_text() for path in begun if f"_replica-{TINY}_" in path.name]
        # Serve's own, after the engine's start.
        assert "Finished initializing replica" in engine.split("vllm.v1.")[-1]

    asyncio.run(run())


def test_what_holds_no_stream_dies_and_nobody_notices(service: Served) -> None:
    async def run() -> None:
        before = serving(service)
        async with under_load(service):
            for name in (DIRECTORY, BATCHES):
                await killed_and_back(service, name)
            for name in UNNEEDED:
                kill(service, name)
            await asyncio.sleep(3)
        after = serving(service)
        del before[BATCHES], after[BATCHES]
        assert after == before

    asyncio.run(run())


def test_without_its_gcs_it_ends_well(service: Served) -> None:
    """The last test: the service has ended then."""

    async def run() -> None:
        below = words_below(service.process.pid)
        family = list(below)
        (gcs,) = [process for process, words in below.items() if words[0].endswith("/gcs_server")]
        begun = service.log.stat().st_size
        load = Load(service)
        async with httpx.AsyncClient(base_url=service.http, timeout=60) as http, AsyncClient(service.grpc) as grpc:
            callers: list[tuple[str, Any]] = [("HTTP", http), ("gRPC", grpc)]
            for way, caller in callers:
                await load.ask(way, caller, SIMULATED, LONG)
            asking = [asyncio.create_task(load.ask(*caller, SIMULATED, LONG)) for caller in callers for _ in range(6)]
            await asyncio.sleep(1)
            assert not any(task.done() for task in asking)
            gcs.kill()

            def lines(*parts: str) -> list[str]:
                new = service.log.read_bytes()[begun:].decode()
                return [line for line in new.splitlines() if all(part in line for part in parts)]

            await until(lambda: bool(lines("lost: Ray's gcs_server")), 60)
            await asyncio.gather(*asking)
        assert load.wrong == []
        answered = time.monotonic()
        assert await asyncio.to_thread(service.process.wait, 60) == 4
        # No longer than what was in work took.
        assert time.monotonic() - answered < 30
        assert [process for process in family if process.is_running()] == []
        assert len(lines("exit code 4")) == 1
        # Nothing that only Ray's developers read.
        assert not lines(".cc:")

    asyncio.run(run())
