"""The processes of a service are killed under load, each kind at least once, on a cluster of its own with simulated
engines: the ledger says what callers were answered, to the token."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pyarrow as pa
import pytest

from bench.gateway import free_port
from hycluster.client import AsyncClient
from hycluster.core import Sampling
from hycluster.ledger.books import open_books
from tests.integration.conftest import SIMULATED, Served, launch, stop
from tests.integration.test_control_plane import BATCHES, DIRECTORY, processes, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

INGRESS, REPLICA = "ServeReplica:hycluster:ingress", f"replica-{SIMULATED}"
CUT_S = 2.0
LINES = 60


@dataclass(frozen=True)
class LedgerService:
    served: Served
    ledger: str
    env: dict[str, str]


@pytest.fixture(scope="module")
def service(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LedgerService]:
    folder = tmp_path_factory.mktemp("ledger")
    settings = {
        "models": [
            {
                "name": SIMULATED,
                "source": str(tiny_model),
                "simulated": {"step_base_s": 0.01, "max_model_len": 2048, "max_num_seqs": 16, "vocab_size": 256},
                "engine": {"max_model_len": 2048},
                "hardware": {"cpus": 0.05},
                "replicas": {"min": 2},
                "price": {"prompt_per_million_tokens": 1, "completion_per_million_tokens": 2.5},
            },
        ],
        "http": {"port": free_port()},
        "grpc": {"port": free_port()},
        "ingress": {"replicas": 2},
        "data_plane": {"host": "127.0.0.1"},
        "batches": {"store": str(folder / "batches"), "shard_lines": 4, "poll_s": 0.2, "lines_in_flight": 4},
        "ledger": {"enabled": True, "cut_every_s": CUT_S},
        "drain_timeout_s": 10,
    }
    path = folder / "settings.yaml"
    path.write_text(json.dumps(settings))
    env = {"HYCLUSTER_HOME": str(folder / "home")}
    server = launch([str(path)], folder / "serve.log", env)
    try:
        yield LedgerService(server, str(folder / "batches/ledger"), env)
    finally:
        if server.process.poll() is None:
            stop(server.process)


@dataclass
class Answers:
    """What callers have had, by the id of the request: prompt and output tokens; and who has had nothing whole."""

    served: Served
    whole: dict[str, tuple[int, int]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    ending: bool = False

    async def keep_asking(self, number: int) -> None:
        way = (self.over_http, self.streamed, self.by_grpc)[number % 3]
        count = 0
        while not self.ending:
            count += 1
            request_id = f"{number}-{count}"
            try:
                self.whole[request_id] = await way(request_id, 3 + (7 * number + count) % 40)
            except (httpx.HTTPError, Exception):
                # An ingress process that is killed takes its callers' connections along.
                self.broken.add(request_id)
                await asyncio.sleep(0.1)

    async def over_http(self, request_id: str, tokens: int) -> tuple[int, int]:
        body = {"model": SIMULATED, "prompt": "x" * (tokens % 5 + 1), "max_tokens": tokens, "ignore_eos": True}
        async with httpx.AsyncClient(base_url=self.served.http, timeout=60) as http:
            answer = await http.post("/v1/completions", json=body, headers={"x-request-id": request_id})
            usage = answer.raise_for_status().json()["usage"]
            return usage["prompt_tokens"], usage["completion_tokens"]

    async def streamed(self, request_id: str, tokens: int) -> tuple[int, int]:
        client = openai.AsyncOpenAI(base_url=f"{self.served.http}/v1", api_key="none", max_retries=0, timeout=60)
        async with client:
            chunks = await client.chat.completions.create(
                model=SIMULATED, messages=[{"role": "user", "content": "hi"}], max_completion_tokens=tokens,
                stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
                extra_headers={"x-request-id": request_id},
            )  # fmt: skip
            usage = [chunk.usage async for chunk in chunks][-1]
            assert usage is not None
            return usage.prompt_tokens, usage.completion_tokens

    async def by_grpc(self, request_id: str, tokens: int) -> tuple[int, int]:
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        async with AsyncClient(self.served.grpc) as client:
            chunks = client.stream(model=SIMULATED, prompt="hello", sampling=sampling, request_id=request_id)
            usage = [chunk.usage async for chunk in chunks][-1]
            assert usage is not None
            return usage.prompt_tokens, usage.completion_tokens

    async def more(self, count: int = 30) -> None:
        before = len(self.whole)
        await until(lambda: len(self.whole) >= before + count, 90)


@asynccontextmanager
async def under_load(served: Served) -> AsyncIterator[Answers]:
    answers = Answers(served)
    asking = [asyncio.create_task(answers.keep_asking(number)) for number in range(9)]
    try:
        await answers.more()
        yield answers
        await answers.more()
    finally:
        answers.ending = True
        await asyncio.gather(*asking)


async def kill_one(served: Served, name: str, answers: Answers) -> None:
    """And wait until there is another one."""
    there = processes(served, name)
    psutil.Process(max(there)).kill()
    await until(lambda: bool(processes(served, name) - there), 120)
    await answers.more()


def entries(ledger: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pa.concat_tables(open_books(ledger).tables()).to_pylist()
    return rows


def usage(service: LedgerService, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "hycluster", "usage", "--json", *arguments]
    said: list[dict[str, Any]] = json.loads(subprocess.check_output(command, env={**os.environ, **service.env}))
    return said


async def test_the_ledger_s_sum_is_that_of_the_answers(service: LedgerService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYCLUSTER_HOME", service.env["HYCLUSTER_HOME"])
    served = service.served
    client = openai.OpenAI(base_url=f"{served.http}/v1", api_key="none", max_retries=10)
    async with under_load(served) as answers:
        batch = await asyncio.to_thread(submit, client)

        def some_lines() -> bool:
            return any(entry["tier"] == "batch" for entry in entries(service.ledger))

        await until(some_lines, 120)
        await kill_one(served, BATCHES, answers)
        await kill_one(served, INGRESS, answers)
        await kill_one(served, REPLICA, answers)
        await kill_one(served, DIRECTORY, answers)
        await kill_one(served, INGRESS, answers)
        ended = await asyncio.to_thread(wait_for, client, batch)
    assert ended.status == "completed"
    assert ended.request_counts.completed == LINES

    # What the commands of this machine say before all is committed.
    told = {each["tier"]: each for each in usage(service, "--by", "tier")}
    found = entries(service.ledger)
    online = {entry["request_id"]: entry for entry in found if entry["tier"] == "online"}
    assert len(online) == sum(entry["tier"] == "online" for entry in found)
    missing = answers.whole.keys() - online.keys()
    assert not missing
    for request_id, tokens in answers.whole.items():
        entry = online[request_id]
        assert (entry["input_tokens"], entry["output_tokens"]) == tokens
        assert (entry["outcome"], entry["requests"]) == ("finished", 1)
    # Others were in work when their ingress process was killed, and were not heard of by their callers.
    assert online.keys() - answers.whole.keys() <= answers.broken
    assert len(answers.broken) < len(answers.whole) / 4
    extra = [online[request_id] for request_id in online.keys() - answers.whole.keys()]
    assert told["online"]["output_tokens"] == sum(out for _, out in answers.whole.values()) + sum(
        entry["output_tokens"] for entry in extra
    )
    # Lines of the batch: once, with what its file says.
    usage_told = ended.usage
    assert usage_told is not None
    lines = told["batch"]
    assert (lines["requests"], lines["input_tokens"], lines["output_tokens"]) == (
        LINES, usage_told.input_tokens, usage_told.output_tokens,
    )  # fmt: skip
    ids = [entry["request_id"] for entry in found if entry["tier"] == "batch"]
    assert len(set(ids)) == LINES

    # What those wrote that were killed is committed by those that live; and by the rest as they end.
    stop(served.process)
    journals = open_books(service.ledger).journals
    assert journals is not None
    left = list(journals.glob("*.jsonl"))
    committed = pa.concat_tables([*open_books(service.ledger).tables()]).num_rows
    assert committed == len(entries(service.ledger)) >= len(found)
    print(f"{len(answers.whole)} answers, {len(answers.broken)} broken, {len(extra)} of them in the ledger, {left}")


def submit(client: openai.OpenAI) -> Any:
    body = {"model": SIMULATED, "prompt": "hello", "max_tokens": 60, "ignore_eos": True}
    lines = "".join(
        json.dumps({"custom_id": f"c{n}", "method": "POST", "url": "/v1/completions", "body": body}) + "\n"
        for n in range(LINES)
    )
    file = client.files.create(file=("in.jsonl", io.BytesIO(lines.encode())), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


def wait_for(client: openai.OpenAI, batch: Any) -> Any:
    end = time.monotonic() + 200
    while time.monotonic() < end:
        with contextlib.suppress(openai.APIConnectionError):
            now = client.batches.retrieve(batch.id)
            if now.status not in ("validating", "in_progress", "finalizing"):
                return now
        time.sleep(0.5)
    raise AssertionError(f"the batch is {now.status}")
