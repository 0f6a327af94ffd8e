"""OpenAI's Batch API on a real cluster, driven by the official client."""

from __future__ import annotations

import io
import json
import os
import signal
from typing import Any, cast

import httpx
import openai
import psutil
import pytest
from openai.types import Batch

from tests.families import titled_below
from tests.integration.conftest import MAX_TOKENS, MODEL, PROMPTS, SIMULATED, Served, eventually, replicas

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# The simulated engines make some 200 tokens a second.
LINES = 240
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.http}/v1", api_key="none", max_retries=0)


def requests(bodies: list[dict[str, Any]], url: str) -> str:
    lines = [{"custom_id": f"c{n}", "method": "POST", "url": url, "body": body} for n, body in enumerate(bodies)]
    return "".join(json.dumps(line) + "\n" for line in lines)


def simulated(count: int, max_tokens: int) -> list[dict[str, Any]]:
    return [{"model": SIMULATED, "prompt": f"p{n}", "max_tokens": max_tokens, "ignore_eos": True} for n in range(count)]


def submit(client: openai.OpenAI, text: str, url: str) -> Batch:
    file = client.files.create(file=("in.jsonl", io.BytesIO(text.encode())), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=cast(Any, url), completion_window="24h")


def ended(client: openai.OpenAI, batch: Batch, timeout_s: float = 120) -> Batch:
    def look() -> Batch | None:
        now = client.batches.retrieve(batch.id)
        return now if now.status in ENDED else None

    return cast(Batch, eventually(look, timeout_s, "the batch has ended"))


def lines(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def executor(served: Served) -> psutil.Process:
    """The process of the batch executor."""
    return cast(psutil.Process, next(iter(titled_below(served.process.pid, "ServeReplica:hycluster:batches")), None))


def test_lines_are_answered_as_they_would_be_online(served: Served, client: openai.OpenAI) -> None:
    bodies: list[dict[str, Any]] = [
        {"model": MODEL, "messages": [{"role": "user", "content": p}], "max_tokens": MAX_TOKENS, "temperature": 0}
        for p in PROMPTS
    ]
    wrong: list[dict[str, Any]] = [
        bodies[0] | {"model": "nobody"},
        bodies[0] | {"temperature": -1},
        bodies[0] | {"messages": "hello"},
        bodies[0] | {"stream": True},
        bodies[0] | {"messages": [{"role": "user", "content": "word " * 5000}]},
    ]
    online = [httpx.post(f"{served.http}{CHAT}", json=body, timeout=120) for body in (*bodies, *wrong[:3])]
    batch = ended(client, submit(client, requests(bodies + wrong, CHAT), CHAT))
    assert (batch.status, batch.errors) == ("completed", None)
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 13, "completed": 8, "failed": 5}
    answers = lines(client, batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"c{n}" for n in range(8)]
    for answer, asked in zip(answers, online[:8], strict=True):
        assert answer["response"]["body"]["choices"] == asked.json()["choices"]
        assert answer["response"]["body"]["usage"]["total_tokens"] == asked.json()["usage"]["total_tokens"]
    errors = lines(client, batch.error_file_id)
    assert [error["custom_id"] for error in errors] == [f"c{n}" for n in range(8, 13)]
    assert [error["response"]["status_code"] for error in errors] == [404, 400, 400, 400, 400]
    for error, asked in zip(errors[:3], online[8:], strict=True):
        assert (error["response"]["status_code"], error["response"]["body"]) == (asked.status_code, asked.json())
    assert batch.usage is not None
    assert batch.usage.output_tokens == sum(a["response"]["body"]["usage"]["completion_tokens"] for a in answers)
    assert client.batches.list(limit=1).data[0].id == batch.id


def test_an_executor_that_is_killed_loses_and_repeats_nothing(served: Served, client: openai.OpenAI) -> None:
    bodies = simulated(LINES, 8)
    batch = submit(client, requests(bodies, COMPLETIONS), COMPLETIONS)

    def halfway() -> int:
        counts = client.batches.retrieve(batch.id).request_counts
        return counts.completed if counts and counts.completed >= LINES // 6 else 0

    done = eventually(halfway, 120, "a part of the batch is done")
    assert done < LINES
    victim = executor(served)
    os.kill(victim.pid, signal.SIGKILL)
    # The ingress processes know as much without it.
    assert client.batches.retrieve(batch.id).status == "in_progress"
    end = ended(client, batch)
    assert end.request_counts is not None
    assert end.request_counts.model_dump() == {"total": LINES, "completed": LINES, "failed": 0}
    assert end.error_file_id is None
    answers = lines(client, end.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"c{n}" for n in range(LINES)]
    # What the simulated engine says is a function of the prompt.
    for number in (0, LINES // 2, LINES - 1):
        online = httpx.post(f"{served.http}{COMPLETIONS}", json=bodies[number], timeout=60).json()
        assert answers[number]["response"]["body"]["choices"] == online["choices"]
    assert executor(served).pid != victim.pid


def test_cancel(client: openai.OpenAI) -> None:
    batch = submit(client, requests(simulated(2000, 5), COMPLETIONS), COMPLETIONS)

    def some() -> bool:
        counts = client.batches.retrieve(batch.id).request_counts
        return counts is not None and counts.completed > 0

    eventually(some, 60, "some lines are answered")
    assert client.batches.cancel(batch.id).status == "cancelling"
    end = ended(client, batch)
    # Nor does an engine go on with any of them.
    eventually(lambda: not any(one.load.running + one.load.waiting for one in replicas(SIMULATED)), 30, "all is idle")
    assert (end.status, end.cancelled_at is not None) == ("cancelled", True)
    assert end.request_counts is not None
    kept, left = lines(client, end.output_file_id), lines(client, end.error_file_id)
    assert len(kept) == end.request_counts.completed > 0
    assert len(kept) + len(left) == 2000
    assert {line["error"]["code"] for line in left} == {"batch_cancelled"}


def test_a_wrong_file_says_which_lines(client: openai.OpenAI) -> None:
    text = requests(simulated(3, 1), COMPLETIONS) + '{"custom_id": "x"}\n'
    batch = ended(client, submit(client, text, COMPLETIONS))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    (error,) = batch.errors.data
    assert (error.code, error.line, error.param) == ("missing_required_parameter", 4, "method")


def test_an_upload_may_be_larger_than_a_request(served: Served, client: openai.OpenAI) -> None:
    content = b'{"custom_id": "a"}\n' + b" " * (40 << 20)
    file = client.files.create(file=("large.jsonl", io.BytesIO(content)), purpose="batch")
    assert file.bytes == len(content)
    assert client.files.content(file.id).content == content
    assert client.files.delete(file.id).deleted
    refused = httpx.post(f"{served.http}{COMPLETIONS}", content=content, timeout=60)
    assert refused.status_code == 413
