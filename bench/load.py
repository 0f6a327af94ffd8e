"""Drive a streaming completions endpoint and measure what callers see and what the server's processes cost.

Closed loop: ``concurrency`` callers, each sends its next request when its last one has ended. Runs as a
process of its own, bounded in count, against loopback only:

    python -m bench.load http://127.0.0.1:8000 MODEL --concurrency 32 --requests 256 --pid 123
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import asdict, dataclass

import aiohttp
import psutil
import uvloop


@dataclass(frozen=True)
class Result:
    """Figures of one run. ``cpu_s`` is of the server's processes, user and system."""

    concurrency: int
    requests: int
    output_tokens: int
    seconds: float
    tokens_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    cpu_s_per_1k_tokens: float
    failed: int


def cpu_seconds(pids: list[int]) -> dict[int, float]:
    """CPU seconds of these processes and all below them, by pid."""
    seen: dict[int, float] = {}
    for pid in pids:
        try:
            root = psutil.Process(pid)
            for process in [root, *root.children(recursive=True)]:
                times = process.cpu_times()
                seen[process.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return seen


async def run(
    url: str, model: str, *, concurrency: int, requests: int, prompt_chars: int, max_tokens: int, pids: list[int],
    api_key: str | None = None,
) -> Result:  # fmt: skip
    """One run.

    Each request has a prompt of its own, of one length, so that neither the prefix cache nor shapes that an
    engine has not seen tell the sides apart.
    """
    ttfts: list[float] = []
    tokens = failed = 0
    left = requests
    rng = random.Random(concurrency)

    async def caller(session: aiohttp.ClientSession) -> None:
        nonlocal tokens, failed, left
        while left > 0:
            left -= 1
            body = {
                "model": model,
                "prompt": "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=prompt_chars)),
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            begun = time.perf_counter()
            first, last = None, b""
            async with session.post(f"{url}/v1/completions", json=body) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        first = first or time.perf_counter() - begun
                        last = line
            if first is not None:
                ttfts.append(first)
            # The last event carries the usage; an event may hold several tokens, or half a character's none.
            got = (json.loads(last[6:]).get("usage") or {}).get("completion_tokens", 0) if last else 0
            if got != max_tokens:
                failed += 1
            tokens += got

    timeout = aiohttp.ClientTimeout(total=300)
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:
        before, begun = cpu_seconds(pids), time.perf_counter()
        await asyncio.gather(*(caller(session) for _ in range(concurrency)))
        seconds, after = time.perf_counter() - begun, cpu_seconds(pids)
    cpu = sum(after.values()) - sum(before.get(pid, 0.0) for pid in after)
    ttfts.sort()
    return Result(
        concurrency=concurrency,
        requests=requests,
        output_tokens=tokens,
        seconds=round(seconds, 3),
        tokens_s=round(tokens / seconds, 1),
        ttft_p50_ms=round(1000 * ttfts[len(ttfts) // 2], 2) if ttfts else 0.0,
        ttft_p99_ms=round(1000 * ttfts[min(len(ttfts) - 1, int(len(ttfts) * 0.99))], 2) if ttfts else 0.0,
        cpu_s_per_1k_tokens=round(1000 * cpu / max(1, tokens), 3),
        failed=failed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-chars", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--pid", type=int, action="append", default=[])
    parser.add_argument("--api-key", help="of the caller")
    a = parser.parse_args()
    result = uvloop.run(
        run(
            a.url,
            a.model,
            concurrency=a.concurrency,
            requests=a.requests,
            prompt_chars=a.prompt_chars,
            max_tokens=a.max_tokens,
            pids=a.pid,
            api_key=a.api_key,
        )
    )
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
