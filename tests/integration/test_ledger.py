"""The processes of a service are killed under load, each kind at least once, on a cluster of its own with simulated
engines: the ledger says what callers were answered, to the token, and a project that asks for five times its limit over
HTTP, gRPC and a batch together had as much as the limit lets in (docs/auth.md)."""

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
from hycluster.auth.database import bring_up_to_date, open_database
from hycluster.auth.limits import Limit
from hycluster.auth.store import KeyStore
from hycluster.client import AsyncClient, key_header
from hycluster.core import Sampling
from hycluster.ledger.books import open_books
from hycluster.settings.auth import Auth
from tests.integration.conftest import SIMULATED, Served, launch, stop
from tests.integration.over_the_limit import OverTheLimit
from tests.integration.test_control_plane import BATCHES, DIRECTORY, processes, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

INGRESS, REPLICA = "ServeReplica:hycluster:ingress", f"replica-{SIMULATED}"
CUT_S = 2.0
LINES = 60
INGRESSES = 4
# The project that asks for five times its limit, in requests a minute; and lines of its batch, beside that.
LIMITED, LIMIT, LIMITED_LINES = "limited", 300, 30
# In its first minute the limit is used up at once, and then nothing comes free; only later can it be lost or had twice.
FIRST_S = 62
# For what could not be given out while the directory was away.
MADE_UP_S = 15


@dataclass(frozen=True)
class LedgerService:
    served: Served
    ledger: str
    env: dict[str, str]
    key: str
    limited_key: str


@pytest.fixture(scope="module")
def service(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LedgerService]:
    folder = tmp_path_factory.mktemp("ledger")
    database = f"sqlite:///{folder / 'keys.db'}"
    engine = open_database(Auth(enabled=True, database=database))
    bring_up_to_date(engine)
    store = KeyStore(engine, "test")
    key, limited_key = (
        store.create_key(store.create_project("acme", project), "test", scopes=("batch",))[1]
        for project in ("search", LIMITED)
    )
    store.set_limit(Limit("acme", LIMITED, requests_per_minute=LIMIT))
    engine.dispose()
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
        "ingress": {"replicas": INGRESSES},
        "auth": {"enabled": True, "database": database},
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
        yield LedgerService(server, str(folder / "batches/ledger"), env, key, limited_key)
    finally:
        if server.process.poll() is None:
            stop(server.process)


@dataclass
class Answers:
    """What callers have had, by the id of the request: prompt and output tokens; and who has had nothing whole."""

    served: Served
    key: str
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
            answer = await http.post(
                "/v1/completions", json=body, headers={"x-request-id": request_id, **key_header(self.key)}
            )
            usage = answer.raise_for_status().json()["usage"]
            return usage["prompt_tokens"], usage["completion_tokens"]

    async def streamed(self, request_id: str, tokens: int) -> tuple[int, int]:
        client = openai.AsyncOpenAI(base_url=f"{self.served.http}/v1", api_key=self.key, max_retries=0, timeout=60)
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
        async with AsyncClient(self.served.grpc, api_key=self.key) as client:
            chunks = client.stream(model=SIMULATED, prompt="hello", sampling=sampling, request_id=request_id)
            usage = [chunk.usage async for chunk in chunks][-1]
            assert usage is not None
            return usage.prompt_tokens, usage.completion_tokens

    async def more(self, count: int = 30) -> None:
        before = len(self.whole)
        await until(lambda: len(self.whole) >= before + count, 90)


@asynccontextmanager
async def under_load(service: LedgerService) -> AsyncIterator[Answers]:
    answers = Answers(service.served, service.key)
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


async def test_kills_under_load(service: LedgerService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYCLUSTER_HOME", service.env["HYCLUSTER_HOME"])
    served = service.served
    client, limited_client = (
        openai.OpenAI(base_url=f"{served.http}/v1", api_key=key, max_retries=10)
        for key in (service.key, service.limited_key)
    )
    over = OverTheLimit(served, service.limited_key, 5 * LIMIT / 60)
    assert len(processes(served, INGRESS)) == INGRESSES
    async with under_load(service) as answers, over.asking():
        batch = await asyncio.to_thread(submit, client, LINES)

        def some_lines() -> bool:
            return any(entry["tier"] == "batch" for entry in entries(service.ledger))

        await until(some_lines, 120)
        await kill_one(served, BATCHES, answers)
        # Only now: a line that was let in and not committed is let in once more.
        limited_batch = await asyncio.to_thread(submit, limited_client, LIMITED_LINES)
        await kill_one(served, INGRESS, answers)
        await kill_one(served, REPLICA, answers)
        await until(lambda: time.time() - over.began_at > FIRST_S, 90)
        await kill_one(served, DIRECTORY, answers)
        back_at = time.time()
        await kill_one(served, INGRESS, answers)
        ended = [
            await asyncio.to_thread(wait_for, *each) for each in ((client, batch), (limited_client, limited_batch))
        ]
        await until(lambda: time.time() - back_at > MADE_UP_S, 90)
    assert [each.status for each in ended] == ["completed", "completed"]
    assert [each.request_counts.completed for each in ended] == [LINES, LIMITED_LINES]

    # What the commands of this machine say before all is committed.
    told = {each["tier"]: each for each in usage(service, "--by", "tier")}
    found = entries(service.ledger)
    over.check(LIMIT, [entry for entry in found if entry["project"] == LIMITED])
    whole, broken = answers.whole | over.whole, answers.broken | over.broken
    online = {entry["request_id"]: entry for entry in found if entry["tier"] == "online"}
    assert len(online) == sum(entry["tier"] == "online" for entry in found)
    missing = whole.keys() - online.keys()
    assert not missing
    for request_id, tokens in whole.items():
        entry = online[request_id]
        assert (entry["input_tokens"], entry["output_tokens"]) == tokens
        assert (entry["outcome"], entry["requests"]) == ("finished", 1)
    # Others were in work when their ingress process was killed, and were not heard of by their callers.
    assert online.keys() - whole.keys() <= broken
    assert len(broken) < len(whole) / 4
    extra = [online[request_id] for request_id in online.keys() - whole.keys()]
    assert told["online"]["output_tokens"] == sum(out for _, out in whole.values()) + sum(
        entry["output_tokens"] for entry in extra
    )
    # Lines of the batches: once, with what their files say.
    sums = [each.usage for each in ended if each.usage is not None]
    lines = told["batch"]
    assert (lines["requests"], lines["input_tokens"], lines["output_tokens"]) == (
        LINES + LIMITED_LINES, sum(each.input_tokens for each in sums), sum(each.output_tokens for each in sums),
    )  # fmt: skip
    ids = [entry["request_id"] for entry in found if entry["tier"] == "batch"]
    assert len(set(ids)) == LINES + LIMITED_LINES

    # What those wrote that were killed is committed by those that live; and by the rest as they end.
    stop(served.process)
    journals = open_books(service.ledger).journals
    assert journals is not None
    left = list(journals.glob("*.jsonl"))
    committed = pa.concat_tables([*open_books(service.ledger).tables()]).num_rows
    assert committed == len(entries(service.ledger)) >= len(found)
    print(f"{len(whole)} answers, {len(broken)} broken, {len(extra)} of them in the ledger, {left}")


def submit(client: openai.OpenAI, count: int) -> Any:
    body = {"model": SIMULATED, "prompt": "hello", "max_tokens": 60, "ignore_eos": True}
    lines = "".join(
        json.dumps({"custom_id": f"c{n}", "method": "POST", "url": "/v1/completions", "body": body}) + "\n"
        for n in range(count)
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
