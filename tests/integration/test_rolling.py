"""Every replica and every ingress process is replaced under load: no request fails, every answer is the undisturbed
one.

Then SIGTERM: what ends in time ends whole, the rest is told why, the command exits 0 and leaves nothing behind. One
cluster, with simulated engines.

The HTTP caller keeps its connections and does what HTTP clients do: a request whose connection fails before a byte of
an answer is sent once more. The gRPC callers retry nothing; one keeps its connection, one makes a new one each time.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from bench.gateway import free_port
from hycluster.chaos.sse import event_lines
from hycluster.client import AsyncClient
from hycluster.core import Sampling
from hycluster.errors import Unavailable
from hycluster.settings.load import Router
from hycluster.settings.simulated import Simulated
from tests.families import titled_below, words_below
from tests.integration.conftest import SIMULATED, Served, launch, stop
from tests.simulated_pool import predicted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHORT, LONG = 40, 1400
PROMPTS = [f"prompt {number}" for number in range(6)]
# A long answer takes half a minute and more, however many there are.
ENGINE = Simulated(step_base_s=0.02, decode_token_s=0.0003, max_model_len=2048, vocab_size=256)
# What the upgrade sets it to, and from what.
OLD_DRAIN_S, NEW_DRAIN_S = 150, 8
Answer = tuple[str, tuple[int, ...]]
UPGRADE_S = 200


@dataclass(frozen=True)
class Rolling:
    served: Served
    settings: Path
    env: dict[str, str]


@pytest.fixture(scope="module")
def rolling(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rolling]:
    model = {
        "name": SIMULATED,
        "source": str(tiny_model),
        "simulated": ENGINE.model_dump(),
        "engine": {"max_model_len": 2048},
        "hardware": {"cpus": 0.05},
        "replicas": {"min": 2},
    }
    settings = {
        "models": [model],
        "http": {"port": free_port()},
        "grpc": {"port": free_port()},
        "ingress": {"replicas": 2},
        "data_plane": {"host": "127.0.0.1"},
        "batches": None,
        "drain_timeout_s": OLD_DRAIN_S,
        "hand_over_after_s": 0.5,
    }
    folder = tmp_path_factory.mktemp("rolling")
    path = folder / "settings.yaml"
    path.write_text(json.dumps(settings))
    # A home of its own: the other tests' cluster stays the one that commands find.
    env = {"HYCLUSTER_HOME": str(folder / "home")}
    server = launch([str(path)], folder / "serve.log", env)
    try:
        yield Rolling(server, path, env)
    finally:
        if server.process.poll() is None:
            stop(server.process)


@dataclass
class Load:
    """Callers that ask again and again until they are told to stop. An answer that others did not get is wrong."""

    served: Served
    expected: dict[tuple[str, int], Answer] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    async def over_http(self, http: httpx.AsyncClient, prompt: str, tokens: int) -> Answer:
        for last in (False, True):
            answering = False
            try:
                async with http.stream(
                    "POST", f"{self.served.http}/v1/completions", json=body(prompt, tokens)
                ) as answer:
                    answering = True
                    answer.raise_for_status()
                    events = [line[6:] async for line in event_lines(answer) if line.startswith("data: ")]
                assert events.pop() == "[DONE]"
                choices = [json.loads(event)["choices"][0] for event in events]
                ids = tuple(token for choice in choices for token in choice["token_ids"] or ())
                return "".join(choice["text"] for choice in choices), ids
            except httpx.TransportError:
                if answering or last:
                    raise
                self.outcomes["sent once more"] += 1
        raise AssertionError("unreachable")

    async def over_grpc(self, caller: AsyncClient, prompt: str, tokens: int) -> Answer:
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        chunks = [c async for c in caller.stream(model=SIMULATED, prompt=prompt, sampling=sampling)]
        outputs = [output for chunk in chunks for output in chunk.outputs]
        return "".join(o.text for o in outputs), tuple(token for o in outputs for token in o.token_ids)

    async def over_new_grpc(self, prompt: str, tokens: int) -> Answer:
        async with AsyncClient(self.served.grpc) as caller:
            return await self.over_grpc(caller, prompt, tokens)

    async def ask(self, way: str, call: Callable[[str, int], Awaitable[Answer]], prompt: str, tokens: int) -> None:
        try:
            answer = await call(prompt, tokens)
            if answer == self.expected.setdefault((prompt, tokens), answer):
                self.outcomes[f"{way} right"] += 1
            else:
                self.wrong.append(f"{way} {prompt} {tokens}: another answer")
        except Exception as error:
            self.wrong.append(f"{way} {prompt} {tokens}: {error!r}")

    async def keep_asking(self, way: str, call: Callable[[str, int], Awaitable[Answer]], prompt: str) -> None:
        while not self.ending.is_set():
            await self.ask(way, call, prompt, SHORT)


def body(prompt: str, tokens: int) -> dict[str, Any]:
    asked = {"model": SIMULATED, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    return asked | {"stream": True, "return_token_ids": True}


async def upgraded(rolling: Rolling, *arguments: str, code: int = 0) -> str:
    """What ``hycluster upgrade`` says; where it is to fail, what it says about that."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hycluster", "upgrade", str(rolling.settings), *arguments,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **rolling.env},
    )  # fmt: skip
    try:
        out, errors = await asyncio.wait_for(process.communicate(), UPGRADE_S)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == code, errors.decode()
    return (errors if code else out).decode()


def processes(served: Served, deployment: str) -> set[int]:
    return {process.pid for process in titled_below(served.process.pid, f":{deployment}")}


async def until(condition: Callable[[], bool], timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - processes tell nobody
            await asyncio.sleep(0.2)


async def test_nothing_is_replaced_unasked(rolling: Rolling) -> None:
    served = rolling.served
    there = [processes(served, f"replica-{SIMULATED}"), processes(served, "ingress")]
    refused = await upgraded(rolling, code=2)
    by = f"started by process {served.process.pid} of this machine at "
    assert f"the service of Ray cluster {served.ray} ({by}" in refused
    assert f"models: {SIMULATED} (2 replicas)\n  ingress processes: 2, {served.http} grpc {served.grpc}\n" in refused
    assert "error: --yes: must be given where there is no terminal to ask at; nothing was changed" in refused
    assert [processes(served, f"replica-{SIMULATED}"), processes(served, "ingress")] == there


async def test_everything_is_replaced_under_load(rolling: Rolling) -> None:
    served = rolling.served
    replicas, ingresses = processes(served, f"replica-{SIMULATED}"), processes(served, "ingress")
    assert (len(replicas), len(ingresses)) == (2, 2)
    load = Load(served)
    limits = httpx.Limits(max_keepalive_connections=20)
    async with httpx.AsyncClient(timeout=120, limits=limits) as http, AsyncClient(served.grpc) as caller:

        async def http_call(prompt: str, tokens: int) -> Answer:
            return await load.over_http(http, prompt, tokens)

        async def grpc_call(prompt: str, tokens: int) -> Answer:
            return await load.over_grpc(caller, prompt, tokens)

        # Undisturbed, for all that follow to compare with.
        await asyncio.gather(*(load.ask("HTTP", http_call, prompt, SHORT) for prompt in PROMPTS))
        long = [
            asyncio.create_task(load.ask(way, call, prompt, LONG))
            for prompt in PROMPTS[:2]
            for way, call in (("HTTP", http_call), ("gRPC", grpc_call))
            for _ in range(2)
        ]
        asking = [
            asyncio.create_task(load.keep_asking(way, call, prompt))
            for prompt in PROMPTS
            for way, call in (("HTTP", http_call), ("gRPC", grpc_call), ("new gRPC", load.over_new_grpc))
        ]
        upgrading = asyncio.create_task(
            upgraded(rolling, "--yes", "--set", f"drain_timeout_s={NEW_DRAIN_S}", "--set", "ingress.replicas=1")
        )
        await until(
            lambda: not processes(served, f"replica-{SIMULATED}") & replicas or upgrading.done(), timeout_s=UPGRADE_S
        )
        handed_over = sum(not task.done() for task in long)
        said = await upgrading
        # Old ingress processes finish their streams, then go.
        await until(lambda: not processes(served, "ingress") & ingresses, timeout_s=OLD_DRAIN_S + 20)
        load.ending.set()
        await asyncio.gather(*long, *asking)
        undisturbed = {prompt: await caller.tokenize(SIMULATED, prompt=prompt) for prompt in PROMPTS[:2]}
    assert load.wrong == []
    assert not processes(served, f"replica-{SIMULATED}") & replicas
    assert min(load.outcomes[f"{way} right"] for way in ("HTTP", "gRPC", "new gRPC")) > 20
    assert handed_over, "no stream outlived the replica that it began on"
    for prompt, ids in undisturbed.items():
        assert load.expected[prompt, LONG][1] == tuple(predicted(ids, LONG, ENGINE))
    assert said.startswith(f"upgraded {served.http} grpc {served.grpc} ")


async def test_sigterm_drains(rolling: Rolling) -> None:
    served = rolling.served
    below = list(words_below(served.process.pid))
    load, ended = Load(served), []
    async with httpx.AsyncClient(timeout=60) as http, AsyncClient(served.grpc) as caller:
        short = [
            asyncio.create_task(load.over_grpc(caller, prompt, SHORT) if i % 2 else load.over_http(http, prompt, SHORT))
            for i, prompt in enumerate(PROMPTS)
        ]

        async def too_long_for_grpc() -> None:
            with pytest.raises(Unavailable, match="shut down before the answer was complete"):
                await load.over_grpc(caller, "x", LONG)
            ended.append("gRPC")

        async def too_long_for_http() -> None:
            async with http.stream("POST", f"{served.http}/v1/completions", json=body("x", LONG)) as answer:
                lines = [line async for line in event_lines(answer) if line]
            assert lines[-1] == "data: [DONE]"
            assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == 503
            ended.append("HTTP")

        long = [asyncio.create_task(too_long_for_grpc()), asyncio.create_task(too_long_for_http())]
        await asyncio.sleep(0.5)
        assert not any(stream.done() for stream in short)
        served.process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        answers = await asyncio.gather(*short)
        assert [len(ids) for _, ids in answers] == [SHORT] * len(PROMPTS)
        await asyncio.gather(*long)
    assert sorted(ended) == ["HTTP", "gRPC"]
    code = await asyncio.to_thread(served.process.wait, 60)
    assert code == 0, served.log.read_text()
    # The settings of the upgrade hold, and nobody has waited for another replica.
    assert time.monotonic() - asked < Router().failover_wait_s / 2
    _, alive = await asyncio.to_thread(psutil.wait_procs, below, 10)
    assert not alive
