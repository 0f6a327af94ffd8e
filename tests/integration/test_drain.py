"""SIGTERM: streams in flight end whole, the command exits 0, nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from hycluster.client import AsyncClient
from hycluster.core import Sampling
from tests.integration.conftest import SIMULATED, eventually, launch, stop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
TOKENS = 250


async def test_sigterm_drains(tiny_model: Path, tmp_path: Path) -> None:
    model = {
        "name": SIMULATED,
        "source": str(tiny_model),
        "simulated": {"decode_token_s": 0.01, "max_model_len": 2048, "vocab_size": 256},
        "engine": {"max_model_len": 2048},
        "hardware": {"cpus": 0.05},
    }
    settings = {
        "models": [model],
        "http": {"port": 0},
        "grpc": {"port": 0},
        "data_plane": {"host": "127.0.0.1"},
        "drain_timeout_s": 30,
    }
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps(settings))
    # A home of its own: the other tests' cluster stays the one that commands find.
    server = await asyncio.to_thread(
        launch, [str(path)], tmp_path / "serve.log", {"HYCLUSTER_HOME": str(tmp_path / "home")}
    )
    try:
        below = psutil.Process(server.process.pid).children(recursive=True)
        async with AsyncClient(server.grpc) as caller, httpx.AsyncClient(timeout=60) as http:

            async def over_grpc() -> int:
                sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
                chunks = [c async for c in caller.stream(model=SIMULATED, prompt="x", sampling=sampling)]
                return sum(len(output.token_ids) for chunk in chunks for output in chunk.outputs)

            async def over_http() -> int:
                body = {"model": SIMULATED, "prompt": "x", "max_tokens": TOKENS, "ignore_eos": True}
                answer = await http.post(f"{server.http}/v1/completions", json=body)
                tokens: int = answer.raise_for_status().json()["usage"]["completion_tokens"]
                return tokens

            streams = [asyncio.create_task(over_grpc() if i % 2 else over_http()) for i in range(4)]
            await asyncio.sleep(1)
            assert not any(stream.done() for stream in streams)
            server.process.send_signal(signal.SIGTERM)
            assert await asyncio.gather(*streams) == [TOKENS] * 4
        code = await asyncio.to_thread(server.process.wait, 60)
        assert code == 0, server.log.read_text()
        _, alive = await asyncio.to_thread(psutil.wait_procs, below, 10)
        assert not alive
    finally:
        if server.process.poll() is None:
            stop(server.process)


def test_sigterm_during_the_start(tiny_model: Path, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    path = tmp_path / "settings.yaml"
    model = {"name": "m", "source": str(tiny_model), "hardware": {"cpus": 0.1, "kv_cache_gib": 0.2}}
    path.write_text(json.dumps({"models": [model], "http": {"port": 0}, "grpc": {"port": 0}}))
    process = subprocess.Popen(
        [sys.executable, "-m", "hycluster", "serve", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HYCLUSTER_HOME": str(tmp_path / "home")},
    )
    try:
        # Ray is up, the engine is not. (While Ray itself starts, its own handler would end the process at once.)
        clusters = tmp_path / "home" / "state" / "clusters"
        eventually(lambda: list(clusters.glob("*.json")), 60, "Ray has started")
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            stop(process)
    assert process.returncode == 0, err
    assert "ready" not in out
    assert "Traceback" not in err
