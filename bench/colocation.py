"""What online callers feel of a batch job on their engine: alone and beside one, with and without colocation.

    python -m bench.colocation --rounds 2 --seconds 120

One replica of the embedded model on one core. Online requests arrive at random (an open loop) with about 60 tokens in
and 24 out; the job is `hycluster batch run --engine shared` over more rows than it can do. Two services are up at the
same time and take turns, so that a noisy machine is noisy for both: `colocation` is as the settings are by default,
`vllm` is vLLM's own scheduler with its priority policy. Medians over rounds are printed, and the ratios to `alone`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench import batch
from bench.gateway import running
from hycluster.client import AsyncClient

SIDES = {"colocation": True, "vllm": False}
ROWS, SHARD_ROWS, ROW_TOKENS = 20_000, 4, 16
# A job's first rows are all prompts; and then some.
SETTLE_S = 20.0


@dataclass(frozen=True)
class Service:
    """A running service: its gRPC address and its Ray cluster's."""

    name: str
    grpc: str
    ray: str
    work: Path


@dataclass
class Figures:
    """Of one window, in seconds; ``itl`` are the gaps between two tokens of a stream."""

    ttft: list[float]
    itl: list[float]
    bulk_tokens_s: float = 0.0


@contextlib.contextmanager
def serving(name: str, colocation: bool, work: Path) -> Iterator[Service]:
    settings = batch.settings()
    settings["models"][0]["colocation"] = {"enabled": colocation}
    folder = work / name
    folder.mkdir()
    (folder / "settings.yaml").write_text(json.dumps(settings))
    log = folder / "serve.log"
    command = [sys.executable, "-m", "hycluster", "serve", str(folder / "settings.yaml")]
    with running(command, {}, log):
        while (ready := re.search(r"^ready .*$", log.read_text(), re.MULTILINE)) is None:
            time.sleep(0.2)
        said = re.match(r"ready \S+ grpc (?P<grpc>\S+) ray (?P<ray>\S+) ", ready[0])
        if said is None:
            raise SystemExit(f"{log}: no addresses in {ready[0]!r}")
        yield Service(name, said["grpc"], said["ray"], folder)


@contextlib.contextmanager
def job(service: Service, number: int) -> Iterator[Path]:
    """A job that does not end by itself; yields its output."""
    path, output = service.work / "job.yaml", service.work / f"out-{number}"
    path.write_text(json.dumps({**batch.job(ROW_TOKENS), "shard_rows": SHARD_ROWS}))
    command = [
        sys.executable,
        "-m",
        "hycluster",
        "batch",
        "run",
        str(path),
        "--input",
        str(service.work.parent / "corpus"),
    ]
    command += ["--output", str(output), "--engine", "shared", "--address", service.ray]
    with running(command, {}, service.work / f"job-{number}.log"):
        while done_tokens(output) == 0:
            time.sleep(1)
        time.sleep(SETTLE_S)
        yield output


def done_tokens(output: Path) -> int:
    """Output tokens that are committed."""
    command = [sys.executable, "-m", "hycluster", "batch", "status", str(output), "--json"]
    said = subprocess.run(command, check=False, capture_output=True, text=True)
    return int(json.loads(said.stdout)["completion_tokens"]) if said.returncode == 0 else 0


async def window(service: Service, seconds: float, rate: float, seed: int) -> Figures:
    """Online requests for so long; waits for the last one."""
    rng, figures = random.Random(seed), Figures([], [])
    words = batch.WORDS.split()

    async def ask(client: AsyncClient) -> None:
        prompt = " ".join(rng.choices(words, k=45))
        last = begun = time.perf_counter()
        async for _ in client.stream(batch.MODEL, prompt=prompt, max_tokens=24, ignore_eos=True, temperature=0):
            now = time.perf_counter()
            if last == begun:
                figures.ttft.append(now - begun)
            else:
                figures.itl.append(now - last)
            last = now

    async with AsyncClient(service.grpc) as client, asyncio.TaskGroup() as group:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, rng.expovariate(rate)))
            group.create_task(ask(client))
    return figures


def beside(service: Service, seconds: float, rate: float, seed: int) -> Figures:
    with job(service, seed) as output:
        before, begun = done_tokens(output), time.monotonic()
        figures = asyncio.run(window(service, seconds, rate, seed))
        figures.bulk_tokens_s = (done_tokens(output) - before) / (time.monotonic() - begun)
    return figures


def bulk_alone(service: Service, seconds: float, seed: int) -> float:
    with job(service, seed) as output:
        before, begun = done_tokens(output), time.monotonic()
        time.sleep(seconds)
        return (done_tokens(output) - before) / (time.monotonic() - begun)


def at(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1e3 if values else float("nan")


def line(name: str, rounds: list[Figures]) -> dict[str, Any]:
    cells = {
        "TTFT p50": [at(each.ttft, 0.5) for each in rounds],
        "TTFT p99": [at(each.ttft, 0.99) for each in rounds],
        "ITL p50": [at(each.itl, 0.5) for each in rounds],
        "ITL p99": [at(each.itl, 0.99) for each in rounds],
        "bulk tokens/s": [each.bulk_tokens_s for each in rounds],
    }
    medians = {key: statistics.median(values) for key, values in cells.items()}
    print(f"{name:<24}" + "".join(f"{value:>14.1f}" for value in medians.values()), flush=True)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--rate", type=float, default=0.5, help="online requests a second")
    parser.add_argument("--sides", default=",".join(SIDES))
    args = parser.parse_args()
    found: dict[str, list[Figures]] = {}
    alone_rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        (work / "corpus").mkdir()
        pq.write_table(pa.table({"text": batch.prompts(ROWS)}), work / "corpus" / "part.parquet")
        services = [stack.enter_context(serving(name, SIDES[name], work)) for name in args.sides.split(",")]
        for number in range(args.rounds):
            for service in services:
                name = service.name
                figures = asyncio.run(window(service, args.seconds, args.rate, number))
                found.setdefault(f"{name}: alone", []).append(figures)
                found.setdefault(f"{name}: beside a job", []).append(
                    beside(service, args.seconds, args.rate, 100 + number)
                )
                alone_rates.setdefault(name, []).append(bulk_alone(service, args.seconds / 2, 200 + number))
    print(f"{'ms':<24}" + "".join(f"{key:>14}" for key in ("TTFT p50", "p99", "ITL p50", "p99", "bulk tok/s")))
    for name, rounds in found.items():
        line(name, rounds)
    for name, rates in alone_rates.items():
        print(f"{name}: the job alone: {statistics.median(rates):.1f} tokens/s")


if __name__ == "__main__":
    main()
