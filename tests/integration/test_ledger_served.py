"""What real engines are asked, and what they had in their KV caches, is in the ledger as the answers tell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pytest

from hycluster.client import Client
from hycluster.core import Sampling
from hycluster.ledger.books import open_books
from tests.integration.conftest import MODEL, Served, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Longer than a block of the KV cache, several times over.
LONG = "Once upon a time, in a village by the sea, there lived an old man who mended nets. " * 8


def test_usage_of_real_engines(served: Served, settings_file: Path) -> None:
    told: dict[str, tuple[int, int, int]] = {}
    client = openai.OpenAI(base_url=f"{served.http}/v1", api_key="none", timeout=120)
    chat: Any = {"model": MODEL, "messages": [{"role": "user", "content": LONG}], "temperature": 0}
    for name, extra in {
        "first": {}, "again": {}, "stopped": {"stop": ["a"]}, "several": {"n": 3, "temperature": 1.0},
    }.items():  # fmt: skip
        request_id = f"ledger-{name}"
        asked = chat | {"max_completion_tokens": 12} | extra
        answer = client.chat.completions.create(**asked, extra_headers={"x-request-id": request_id})
        told[request_id] = of(answer.usage)
    chunks = client.chat.completions.create(
        **chat, max_completion_tokens=9, stream=True, stream_options={"include_usage": True},
        extra_headers={"x-request-id": "ledger-stream"},
    )  # fmt: skip
    told["ledger-stream"] = of([chunk.usage for chunk in chunks][-1])
    completion: Any = client.completions.create(
        model=MODEL, prompt=["a", LONG], max_tokens=5, extra_headers={"x-request-id": "ledger-completion"}
    )
    with Client(served.grpc) as by_grpc:
        sampling = Sampling(max_tokens=7, temperature=0)
        generated = by_grpc.generate(MODEL, prompt=LONG, sampling=sampling, request_id="ledger-grpc")
    assert generated.usage is not None
    usage = generated.usage
    told["ledger-grpc"] = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
    # The embedded model is on two replicas, so it may be the third that finds its prompt.
    assert any(cached for _, _, cached in told.values())

    place = json.loads(settings_file.read_text())["batches"]["store"] + "/ledger"

    def entries() -> dict[str, dict[str, Any]]:
        rows = pa.concat_tables(open_books(place).tables()).to_pylist()
        found = {row["request_id"]: row for row in rows if row["request_id"].startswith("ledger-")}
        return found if len(found) == len(told) + 1 else {}

    found = eventually(entries, 60, "the ledger has all of them")
    assert {
        request_id: (row["input_tokens"], row["output_tokens"], row["cached_tokens"])
        for request_id, row in found.items()
        if request_id in told
    } == told
    row = found["ledger-completion"]
    assert (row["input_tokens"], row["output_tokens"]) == of(completion.usage)[:2]
    assert {(row["tenant"], row["outcome"], row["requests"]) for row in found.values()} == {("", "finished", 1)}


def of(usage: Any) -> tuple[int, int, int]:
    details = usage.prompt_tokens_details
    return usage.prompt_tokens, usage.completion_tokens, (details.cached_tokens or 0) if details is not None else 0
