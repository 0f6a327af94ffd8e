"""Every replica and every door is replaced under load: no request fails, every answer is the undisturbed one.

Then SIGTERM: the command exits 0 and leaves nothing behind. One cluster, with simulated engines.

The HTTP caller keeps its connections and does what HTTP clients do: a request whose connection fails before a byte of
an answer is sent once more. The gRPC callers retry nothing; one keeps its connection, one makes a new one each time.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from bench.gateway import free_port
from hycluster.client import AsyncClient
from hycluster.core import Sampling
from tests.integration.conftest import SIMULATED, Served, launch, stop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SHORT, LONG = 40, 1400
PROMPTS = [f"prompt {number}" for number in range(6)]
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
        # A long answer takes half a minute and more, however many there are.
        "simulated": {"step_base_s": 0.02, "decode_token_s": 0.0003, "max_model_len": 2048, "vocab_size": 256},
        "engine": {"max_model_len": 2048},
        "hardware": {"cpus": 0.05},
        "replicas": {"min": 2},
    }
    settings = {
        "models": [model],
        "http": {"port": free_port()},
        "grpc": {"port": free_port()},
        "doors": 2,
        "data_plane": {"host": "127.0.0.1"},
        "batches": None,
        "drain_timeout_s": 45,
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
    """Callers that ask again and again until they are told to stop."""

    served: Served
    expected: dict[tuple[str, int], str] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    async def over_http(self, http: httpx.AsyncClient, prompt: str, tokens: int) -> str:
        body = {"model": SIMULATED, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        for last in (False, True):
            answering = False
            try:
                async with http.stream("POST", f"{self.served.http}/v1/completions", json=body) as answer:
                    answering = True
                    answer.raise_for_status()
                    events = [line[6:] async for line in answer.aiter_lines() if line.startswith("data: ")]
                assert events.pop() == "[DONE]"
                return "".join(json.loads(event)["choices"][0]["text"] for event in events)
            except httpx.TransportError:
                if answering or last:
                    raise
                self.outcomes["sent once more"] += 1
        raise AssertionError("unreachable")

    async def over_grpc(self, caller: AsyncClient, prompt: str, tokens: int) -> str:
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        chunks = [c async for c in caller.stream(model=SIMULATED, prompt=prompt, sampling=sampling)]
        return "".join(output.text for chunk in chunks for output in chunk.outputs)

    async def over_new_grpc(self, prompt: str, tokens: int) -> str:
        async with AsyncClient(self.served.grpc) as caller:
            return await self.over_grpc(caller, prompt, tokens)

    async def ask(self, way: str, call: Callable[[str, int], Awaitable[str]], prompt: str, tokens: int) -> None:
        try:
            if await call(prompt, tokens) == self.expected[prompt, tokens]:
                self.outcomes[f"{way} right"] += 1
            else:
                self.wrong.append(f"{way} {prompt} {tokens}: another answer")
        except Exception as error:
            self.wrong.append(f"{way} {prompt} {tokens}: {error!r}")

    async def keep_asking(self, way: str, call: Callable[[str, int], Awaitable[str]], prompt: str) -> None:
        while not self.ending.is_set():
            await self.ask(way, call, prompt, SHORT)


async def upgraded(rolling: Rolling, *arguments: str) -> str:
    """What ``hycluster upgrade`` says."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hycluster", "upgrade", str(rolling.settings), *arguments,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **rolling.env},
    )  # fmt: skip
    try:
        out, errors = await asyncio.wait_for(process.communicate(), UPGRADE_S)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, errors.decode()
    return out.decode()


def processes(served: Served, deployment: str) -> set[int]:
    below = psutil.Process(served.process.pid).children(recursive=True)
    return {p.pid for p in below if f":{deployment}" in " ".join(p.cmdline())}


async def test_everything_is_replaced_under_load(rolling: Rolling) -> None:
    served = rolling.served
    replicas, doors = processes(served, f"replica-{SIMULATED}"), processes(served, "door")
    assert (len(replicas), len(doors)) == (2, 2)
    load = Load(served)
    limits = httpx.Limits(max_keepalive_connections=20)
    async with httpx.AsyncClient(timeout=120, limits=limits) as http, AsyncClient(served.grpc) as caller:

        async def http_call(prompt: str, tokens: int) -> str:
            return await load.over_http(http, prompt, tokens)

        async def grpc_call(prompt: str, tokens: int) -> str:
            return await load.over_grpc(caller, prompt, tokens)

        async def learn(prompt: str, tokens: int) -> None:
            load.expected[prompt, tokens] = await grpc_call(prompt, tokens)

        wanted = [(prompt, SHORT) for prompt in PROMPTS] + [(prompt, LONG) for prompt in PROMPTS[:2]]
        await asyncio.gather(*(learn(*each) for each in wanted))
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
        upgrading = asyncio.create_task(upgraded(rolling))
        while processes(served, f"replica-{SIMULATED}") & replicas and not upgrading.done():
            await asyncio.sleep(0.2)
        still = sum(not task.done() for task in long)
        print(f"replicas replaced; {still} long streams still run")
        began = time.monotonic()
        said = await upgrading
        print(f"doors {time.monotonic() - began:.1f} s later; {said}")
        # Old doors finish their streams, then go.
        while processes(served, "door") & doors:
            await asyncio.sleep(0.2)
        load.ending.set()
        await asyncio.gather(*long, *asking)
    print(dict(load.outcomes))
    assert load.wrong == []
    assert not processes(served, f"replica-{SIMULATED}") & replicas
    assert min(load.outcomes[f"{way} right"] for way in ("HTTP", "gRPC", "new gRPC")) > 20
    assert still, "no stream outlived the replica that it began on"
    assert said.startswith(f"upgraded {served.http} grpc {served.grpc} ")
