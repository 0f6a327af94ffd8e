"""A start is each model's own affair, and a full machine gets ready."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from hycluster.chaos.sse import event_lines
from tests.families import titled_below, words_below
from tests.integration.conftest import eventually, listen

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SIMULATED = {"decode_token_s": 0.02, "max_model_len": 2048, "vocab_size": 256}
WHOLE = os.cpu_count() or 2


class Starting:
    """A ``hycluster serve`` that has been begun, with ports that are known."""

    def __init__(self, folder: Path, models: list[dict[str, Any]], **settings: Any) -> None:
        self.http, self.log = f"http://127.0.0.1:{free_port()}", folder / "log"
        path = folder / "settings.yaml"
        path.write_text(
            json.dumps(
                {
                    "models": models,
                    "http": {"port": int(self.http.rpartition(":")[2])},
                    "grpc": {"port": 0},
                    "data_plane": {"host": "127.0.0.1"},
                    "batches": {"store": str(folder / "batches"), "poll_s": 0.2},
                    "drain_timeout_s": 30,
                }
                | settings
            )
        )
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hycluster", "serve", str(path)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def ready(self) -> str:
        """The ready line's models."""
        words = listen(self.process, self.log)
        self.ray = words[words.index("ray") + 1]
        return words[words.index("models") + 1]

    def below(self, part: str) -> list[psutil.Process]:
        return titled_below(self.process.pid, part)

    def said(self, *parts: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if all(part in line for part in parts)]

    def healthy(self) -> bool:
        try:
            return httpx.get(f"{self.http}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            finally:
                if self.process.poll() is None:
                    family = words_below(self.process.pid)
                    self.process.kill()
                    for process in family:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def simulated(name: str, source: Path, cpus: float) -> dict[str, Any]:
    return {
        "name": name,
        "source": str(source),
        "simulated": SIMULATED,
        "engine": {"max_model_len": 2048},
        "hardware": {"cpus": cpus},
        "replicas": {"min": 2},
    }


async def streams(http: str, model: str, count: int, tokens: int) -> list[int]:
    """How many tokens each of some streams got; one that is cut raises."""

    async def one(caller: httpx.AsyncClient) -> int:
        got, done = 0, False
        body = {"model": model, "prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        async with caller.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in event_lines(answer):
                # A chunk may hold several tokens; the last one counts them.
                if line.startswith("data: {") and (usage := json.loads(line[6:]).get("usage")):
                    got = usage["completion_tokens"]
                done |= line == "data: [DONE]"
        assert done
        return got

    async with httpx.AsyncClient(base_url=http, timeout=200) as caller:
        return await asyncio.gather(*(one(caller) for _ in range(count)))


@pytest.fixture
def half_broken(tmp_path: Path, tiny_model: Path) -> Iterator[Starting]:
    """Two models, one of which no machine has the memory for; ahead of the other, as the order must not matter.

    Together they take all of the machine's CPUs.
    """
    broken = {
        "name": "broken",
        "source": str(tiny_model),
        "engine": {"max_model_len": 2048},
        "hardware": {"cpus": 0.25, "kv_cache_gib": 9000},
    }
    starting = Starting(tmp_path, [broken, simulated("fine", tiny_model, (WHOLE - 0.25) / 2)])
    yield starting
    starting.end()


async def test_what_serves_serves_on(half_broken: Starting) -> None:
    service = half_broken
    await asyncio.to_thread(eventually, service.healthy, 200, "callers of the fine model are served")
    # The start is not over: the other one has only begun, or is trying again.
    asking = asyncio.create_task(streams(service.http, "fine", 20, 60))
    await asyncio.sleep(2)
    ingresses = service.below("hycluster:ingress")
    for part in ("replica-fine", "hycluster:batches"):
        os.kill(service.below(part)[0].pid, signal.SIGKILL)
    assert await asking == [60] * 20
    assert await asyncio.to_thread(service.ready) == "fine"
    assert [p.pid for p in service.below("hycluster:ingress")] == [p.pid for p in ingresses]
    async with httpx.AsyncClient(base_url=service.http, timeout=60) as caller:
        refused = await caller.post("/v1/completions", json={"model": "broken", "prompt": "x", "max_tokens": 2})
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        for said in (
            refused.json()["error"]["message"],
            (await caller.get("/health")).json()["models"]["broken"]["reason"],
        ):
            assert "the engine did not start" in said
            assert "9000" in said
        assert (await caller.get("/health")).json()["status"] == "degraded"
        asked = {name: (await caller.get("/health", params={"model": name})).status_code for name in ("fine", "broken")}
        assert asked == {"fine": 200, "broken": 503}
        async with asyncio.timeout(30):
            # The ingress processes tell their counts each five seconds.
            while (state := await _state(caller))["traffic"]["answered"] < 20:  # noqa: ASYNC110 - as callers look
                await asyncio.sleep(0.5)
        _the_state_says_what_is_wrong(state)
    # What it was at while it started, which is looked at each half second, and what became of it.
    assert len(service.said("] fine: ")) >= 2
    assert service.said("] fine: ", "2 of 2 replicas serve")
    assert service.said("] ingress: open")
    status = [sys.executable, "-m", "hycluster", "status", "--address", service.ray, "--json"]
    done = await asyncio.to_thread(subprocess.run, status, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    _the_state_says_what_is_wrong(json.loads(done.stdout))
    # There are CPUs left for nobody, and a batch needs none.
    await asyncio.to_thread(_run_a_batch, service.http)
    # It is tried again, and each that was lost and came back has its two lines.
    await asyncio.to_thread(eventually, lambda: service.said("not started: model broken: 2 starts"), 120, "tried again")
    for lost in ("replica of fine", "batch executor"):
        await asyncio.to_thread(eventually, partial(service.said, "back: ", lost), 60, f"{lost} is back")
        assert len(service.said("lost: ", lost)) == 1
    # Also while a start waits for its turn, which it does most of the time by now.
    service.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(service.process.wait, 100) == 0


async def _state(caller: httpx.AsyncClient) -> dict[str, Any]:
    return dict((await caller.get("/hycluster/status")).raise_for_status().json())


def _the_state_says_what_is_wrong(state: dict[str, Any]) -> None:
    assert state["state"] == "degraded"
    broken, fine = state["pools"]
    assert (broken["model"], broken["replicas_ready"]) == ("broken", 0)
    assert "9000" in broken["why"]
    assert any(broken["why"] in problem for problem in state["problems"])
    assert any(fault["model"] == "broken" and "9000" in fault["what"] for fault in state["faults"])
    assert (fine["model"], fine["state"], len(fine["replicas"])) == ("fine", "ready", 2)
    assert fine["replicas"][0]["host"] == "127.0.0.1"
    assert state["batches"] == []


def _run_a_batch(http: str) -> None:
    client = OpenAI(base_url=f"{http}/v1", api_key="none")
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions"}
    body = {"model": "fine", "prompt": "x", "max_tokens": 3}
    file = client.files.create(file=("r.jsonl", json.dumps(line | {"body": body}).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    eventually(lambda: client.batches.retrieve(batch.id).status == "completed", 120, "the batch is done")
