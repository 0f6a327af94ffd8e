"""What was computed once is not computed again: between a conversation's turns, and from host memory."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from hycluster.client import Client
from hycluster.core import Sampling
from hycluster.directory.directory import REPORT_EVERY_S
from tests.integration.featured import BLOCK_TOKENS, KV_TOKENS, TINY, Featured

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Prompts that are asked for twice.
AGAIN = 16


def tokens(seed: int, count: int = 2 * BLOCK_TOKENS + 50) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(2, 250) for _ in range(count)]


def reported() -> None:
    """Wait until replicas have told what they count, and ingress processes have heard."""
    time.sleep(4 * REPORT_EVERY_S)


def total(ingress: httpx.Client, family: str, **labels: str) -> float:
    """Sum over the replicas of one metric of the tiny model."""
    wanted = [f'{name}="{value}"' for name, value in {"model_name": TINY, **labels}.items()]
    lines = [line for line in ingress.get("/metrics").text.splitlines() if line.startswith(f"{family}{{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in wanted))


def test_blocks_that_the_kv_cache_dropped_come_back_from_host_memory(featured: Featured) -> None:
    with httpx.Client(base_url=featured.served.http, timeout=120) as ingress:

        def ask(seed: int) -> tuple[list[int], int]:
            asked = {"prompt": tokens(seed), "temperature": 0, "max_tokens": 8, "ignore_eos": True}
            body = {"model": TINY, "session_id": "offload", "return_token_ids": True, **asked}
            answer = ingress.post("/v1/completions", json=body).raise_for_status().json()
            cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            return answer["choices"][0]["token_ids"], cached

        # Two replicas share them, each so many that its KV cache is full twice. Two at a time, so that each gets half.
        others = 2 * 2 * KV_TOKENS // len(tokens(0))
        with ThreadPoolExecutor(2) as callers:
            first = list(callers.map(ask, range(AGAIN)))
            assert not any(cached for _, cached in callers.map(ask, range(AGAIN, AGAIN + others)))
            reported()
            on_device, loaded = (
                total(ingress, f"vllm:{name}_total") for name in ("prefix_cache_hits", "kv_offload_load_bytes")
            )
            again = list(callers.map(ask, range(AGAIN)))
        assert [answer for answer, _ in again] == [answer for answer, _ in first]
        # Nobody is told of host memory, so a prompt comes to the replica that has it there, or to the other one.
        found = [cached for _, cached in again if cached]
        assert found == [2 * BLOCK_TOKENS] * len(found) != []
        reported()
        assert total(ingress, "vllm:prefix_cache_hits_total") == on_device
        # 2 layers x 2 (K, V) x 2 heads x 32 channels x 4 bytes.
        assert total(ingress, "vllm:kv_offload_load_bytes_total") - loaded == sum(found) * 1024
        assert total(ingress, "vllm:external_prefix_cache_hits_total") >= sum(found)


@pytest.mark.parametrize("session", [f"conversation-{number}" for number in range(4)])
def test_the_next_turn_finds_the_last_one_at_every_ingress_process(featured: Featured, session: str) -> None:
    """Each turn comes by a connection of its own, to one of two ingress processes, and there are two replicas."""
    history: list[dict[str, Any]] = [{"role": "user", "content": session * 20}]
    before = 0
    for turn in range(3):
        body = {"model": TINY, "messages": history, "session_id": session, "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{featured.served.http}/v1/chat/completions", json=body, timeout=120).json()
        cached = (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0
        assert cached == before // BLOCK_TOKENS * BLOCK_TOKENS
        before = answer["usage"]["prompt_tokens"]
        history += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": f"{turn}" * 30}]
    with Client(featured.served.grpc) as client:
        last = client.generate(
            model=TINY, messages=history, session_id=session, sampling=Sampling(max_tokens=4, temperature=0)
        )
    assert last.usage is not None
    assert last.usage.cached_tokens == before // BLOCK_TOKENS * BLOCK_TOKENS
