"""Four ingress processes, and the batch executor, at five times one limit, over HTTP, gRPC and a batch together: one is
killed and the directory starts again, and as much is let in as the limit says. Simulated engines."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import psutil
import pytest

from bench.gateway import free_port
from hycluster.auth.database import bring_up_to_date, open_database
from hycluster.auth.limits import Limit
from hycluster.auth.store import KeyStore
from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.ingress.proto import inference_pb2_grpc
from hycluster.settings.auth import Auth
from tests.integration.conftest import SIMULATED, Served, launch, stop
from tests.integration.test_control_plane import DIRECTORY, processes, until
from tests.integration.test_ledger import INGRESS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

INGRESSES = 4
LIMIT = 600
# Beside which the batch offers what it has.
OFFERED_PER_S = 5 * LIMIT / 60
LINES = 200
WATCHED_S = 35


@pytest.fixture
def service(tiny_model: Path, tmp_path: Path) -> Iterator[tuple[Served, str]]:
    database = f"sqlite:///{tmp_path / 'keys.db'}"
    engine = open_database(Auth(enabled=True, database=database))
    bring_up_to_date(engine)
    store = KeyStore(engine, "test")
    _, key = store.create_key(store.create_project("acme", "search"), "test", scopes=("batch",))
    store.set_limit(Limit("acme", requests_per_minute=LIMIT))
    engine.dispose()
    settings = {
        "models": [
            {
                "name": SIMULATED,
                "source": str(tiny_model),
                "simulated": {"step_base_s": 0.005, "max_model_len": 512, "max_num_seqs": 64, "vocab_size": 256},
                "engine": {"max_model_len": 512},
                "hardware": {"cpus": 0.05},
            },
        ],
        "http": {"port": free_port()},
        "grpc": {"port": free_port()},
        "ingress": {"replicas": INGRESSES},
        "auth": {"enabled": True, "database": database},
        "data_plane": {"host": "127.0.0.1"},
        "batches": {"store": str(tmp_path / "batches"), "shard_lines": 20, "poll_s": 0.2, "lines_in_flight": 16},
        "drain_timeout_s": 2,
    }
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps(settings))
    server = launch([str(path)], tmp_path / "serve.log", {"HYCLUSTER_HOME": str(tmp_path / "home")})
    try:
        yield server, key
    finally:
        if server.process.poll() is None:
            stop(server.process)


@dataclass
class Load:
    """Attributes: let_in: by way, when requests were (seconds, monotonic). outcomes: by way and what came of it."""

    served: Served
    key: str
    let_in: dict[str, list[float]] = field(default_factory=lambda: {"HTTP": [], "gRPC": []})
    outcomes: Counter[str] = field(default_factory=Counter)

    async def over_http(self) -> None:
        body = {"model": SIMULATED, "prompt": "x", "max_tokens": 2, "ignore_eos": True}
        headers = {"authorization": f"Bearer {self.key}", "connection": "close"}
        try:
            # A connection of its own: any of the ingress processes may get it.
            async with httpx.AsyncClient(base_url=self.served.http, headers=headers, timeout=30) as http:
                answer = await http.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            self.outcomes[f"HTTP {type(error).__name__}"] += 1
            return
        self.outcomes[f"HTTP {answer.status_code}"] += 1
        if answer.status_code == 200:
            self.let_in["HTTP"].append(time.monotonic())

    async def by_grpc(self) -> None:
        asked = pb.GenerateRequest(model=SIMULATED, prompt="x", sampling=pb.Sampling(max_tokens=2, ignore_eos=True))
        options = [("grpc.use_local_subchannel_pool", 1)]
        try:
            async with grpc.aio.insecure_channel(self.served.grpc, options=options) as channel:
                stub: Any = inference_pb2_grpc.InferenceStub(channel)
                await stub.Generate(asked, timeout=30, metadata=(("authorization", f"Bearer {self.key}"),))
        except grpc.aio.AioRpcError as error:
            self.outcomes[f"gRPC {error.code().name}"] += 1
            return
        self.outcomes["gRPC OK"] += 1
        self.let_in["gRPC"].append(time.monotonic())

    async def go_on(self, per_s: float) -> None:
        """Until cancelled; what is in flight is ended then."""
        began, number = time.monotonic(), 0
        async with asyncio.TaskGroup() as group:
            while True:
                number += 1
                await asyncio.sleep(max(0.0, began + number / per_s - time.monotonic()))
                group.create_task(self.over_http() if number % 2 else self.by_grpc())


def submit(client: openai.OpenAI) -> Any:
    body = {"model": SIMULATED, "prompt": "x", "max_tokens": 2, "ignore_eos": True}
    lines = "".join(
        json.dumps({"custom_id": f"c{n}", "method": "POST", "url": "/v1/completions", "body": body}) + "\n"
        for n in range(LINES)
    )
    file = client.files.create(file=("in.jsonl", io.BytesIO(lines.encode())), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


async def test_one_limit_over_all_ways_in(service: tuple[Served, str]) -> None:
    served, key = service
    client = openai.OpenAI(base_url=f"{served.http}/v1", api_key=key, max_retries=10)
    load = Load(served, key)
    assert len(processes(served, INGRESS)) == INGRESSES
    batch = await asyncio.to_thread(submit, client)
    began = time.monotonic()
    asking = asyncio.create_task(load.go_on(OFFERED_PER_S))

    def let_in() -> int:
        return sum(map(len, load.let_in.values()))

    await until(lambda: let_in() > LIMIT / 10, 30)
    psutil.Process(max(processes(served, INGRESS))).kill()
    await until(lambda: let_in() > LIMIT / 4, 30)
    (directory,) = processes(served, DIRECTORY)
    psutil.Process(directory).kill()
    await until(lambda: bool(processes(served, DIRECTORY) - {directory}), 60)
    # A limit's worth is let in by now, and nothing comes free again before the minute is over.
    await asyncio.sleep(max(0.0, began + WATCHED_S - time.monotonic()))

    def lines() -> int:
        with contextlib.suppress(openai.APIError):
            return int(client.batches.retrieve(batch.id).request_counts.completed)
        return 0

    answered = await asyncio.to_thread(lines)
    took_s = time.monotonic() - began
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    ways = {way: len(times) for way, times in load.let_in.items()} | {"batch": answered}
    share = sum(ways.values()) / LIMIT
    print(f"{share:.3f} of the limit in {took_s:.1f} s: {ways}; {dict(load.outcomes)}")
    assert took_s < 58
    assert min(ways.values()) > 0
    assert 1.0 <= share <= 1.02
