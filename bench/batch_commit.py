"""What exactly-once costs: rows/s of a batch job against a plain ``map_batches`` without any commit.

    python -m bench.batch_commit --engine simulated          or          --engine real

Both sides ask the same engines of one running cluster for the same rows, with as many rows in flight, through the same
gateway in one Ray Data actor. ``plain`` reads the corpus by ``ray.data.read_parquet``, asks, and drops the answers;
``plain+write`` writes them by ``write_parquet``; ``job`` is ``hycluster batch run`` with its plan, lease, shard
records, checksums and manifest. What is timed goes from the first row asked to the last one answered (``job``: to the
last shard committed); what Ray, the gateway and engines take to start is left out on every side. Sides take turns,
round after round; medians, the ratios to ``plain`` and the CPU time of the cluster and the side are printed.

``simulated`` is the timing model in the place of an engine, in real time: some hundred rows/s that cost little CPU.
``real`` is vLLM on a model without size, so that engine, gateway and commit fight for the same cores: the hardest case.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench import tiny_llama
from bench.batch import prompts
from bench.gateway import running
from bench.load import cpu_seconds
from hycluster.core import Generation, GenerationRequest, Priority, Sampling

MODEL = "tiny"
IN_FLIGHT = 256
SHARD_ROWS = 256
SAMPLING = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
SIDES = ("plain", "plain+write", "job")
# Enough that a turn takes twenty seconds: what is done once, such as starting readers, must not count.
ROWS = {"simulated": 6000, "real": 10000}


def settings(engine: str, model: Path) -> dict[str, Any]:
    # Half a CPU on paper is one engine thread all the same, and leaves ``read_parquet`` the whole one that it asks for.
    hardware = {"cpus": 0.5, "kv_cache_gib": 1}
    entry: dict[str, Any] = {"name": MODEL, "source": str(model), "hardware": hardware}
    if engine == "simulated":
        # A full batch takes 32 ms a step and 16 steps an answer.
        entry["simulated"] = {
            "step_base_s": 0.015,
            "prefill_token_s": 0.000005,
            "decode_token_s": 0.00005,
            "max_num_seqs": IN_FLIGHT,
            "max_num_batched_tokens": 8192,
            "kv_blocks": 16384,
            "max_model_len": 2048,
            "vocab_size": 258,
        }
    else:
        entry["engine"] = {"max_model_len": 2048, "max_num_seqs": 64}
    return {
        "models": [entry],
        "http": {"port": 0},
        "grpc": {"port": 0},
        "data_plane": {"host": "127.0.0.1"},
    }


def job() -> dict[str, Any]:
    return {
        "name": "bench",
        "model": MODEL,
        "task": "generate",
        "prompt": "{text}",
        "input": {"columns": {"text": "text"}},
        "sampling": SAMPLING,
        "rows_in_flight": IN_FLIGHT,
        "shard_rows": SHARD_ROWS,
    }


class Plain:
    """The callable class that one would write for ``map_batches``: asks for all rows of a batch at once."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._opening = asyncio.Lock()
        self._generator: Any = None

    async def __call__(self, batch: pa.Table) -> pa.Table:
        async with self._opening:
            if self._generator is None:
                from hycluster.directory.directory import SHARED_DIRECTORY
                from hycluster.gateway.generation import open_generator

                self._context = open_generator(SHARED_DIRECTORY, MODEL)
                self._generator = await self._context.__aenter__()
        begun_at = time.time()
        outputs = await asyncio.gather(*map(self._ask, batch.column("text").to_pylist()))
        batch = batch.append_column("output", pa.array(outputs, pa.string()))
        for name, at in (("begun_at", begun_at), ("ended_at", time.time())):
            batch = batch.append_column(name, pa.repeat(pa.scalar(at), batch.num_rows))
        return batch

    async def _ask(self, text: str) -> str:
        request = GenerationRequest(
            model=MODEL,
            messages=[{"role": "user", "content": text}],
            sampling=Sampling(**SAMPLING),  # type: ignore[arg-type]
            priority=Priority.BATCH,
        )
        async with self._slots:
            generation: Generation = await self._generator.generate(request)
        return generation.outputs[0].text


def plain(corpus: Path, out: Path | None) -> tuple[float, float]:
    """Run it; when the first row was asked and the last one answered, seconds since the epoch."""
    import ray

    from hycluster import cluster

    cluster.join_cluster()
    ray.data.DataContext.get_current().enable_progress_bars = False
    answered = ray.data.read_parquet(str(corpus), override_num_blocks=8, num_cpus=0.1).map_batches(
        Plain,
        batch_size=SHARD_ROWS,
        batch_format="pyarrow",
        num_cpus=0.1,
        compute=ray.data.ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=4, max_tasks_in_flight_per_actor=5),
    )
    if out is not None:
        answered.write_parquet(str(out), ray_remote_args={"num_cpus": 0.1})
        tables = [pq.read_table(path, columns=["begun_at", "ended_at"]) for path in out.glob("*.parquet")]
        ended_at = time.time()
    else:
        batches: Iterable[Any] = answered.iter_batches(batch_size=None, batch_format="pyarrow")
        tables = [batch.select(["begun_at", "ended_at"]) for batch in batches]
        ended_at = 0.0
    times = pa.concat_tables(tables).to_pydict()
    return min(times["begun_at"]), max(ended_at, *times["ended_at"])


def env(work: Path) -> dict[str, str]:
    """A home of this benchmark's own, so that its jobs find its cluster and no other."""
    return {**os.environ, "HYCLUSTER_HOME": str(work / "home")}


def span(out: Path) -> tuple[float, float]:
    """Of a finished job, by its manifest: the first row asked, the last shard committed."""
    shards = json.loads((out / "_manifest.json").read_text())["shards"]
    return min(shard["begun_at"] for shard in shards), max(shard["committed_at"] for shard in shards)


def turn(side: str, work: Path, out: Path, cluster_pid: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of the cluster and of the side in them."""
    if side == "job":
        command = ["-m", "hycluster", "batch", "run", str(work / "job.yaml"), "--input", str(work / "corpus")]
        command += ["--output", str(out)]
    else:
        command = ["-m", "bench.batch_commit", "--side", side, str(work / "corpus"), str(out)]
    cpu: dict[int, float] = {}
    curve: list[tuple[float, float]] = []
    log = work / "side.log"
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=env(work))
        while process.poll() is None:
            # What has ended keeps what it had.
            cpu |= cpu_seconds([cluster_pid, process.pid])
            curve.append((time.time(), sum(cpu.values())))
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(log.read_text())
    if side == "job":
        begun_at, ended_at = span(out)
    else:
        begun_at, ended_at = json.loads(log.read_text().splitlines()[-1])
    return ended_at - begun_at, _at(curve, ended_at) - _at(curve, begun_at)


def _at(curve: list[tuple[float, float]], at: float) -> float:
    """A curve's value between two of its points."""
    import numpy as np

    times, values = zip(*curve, strict=True)
    return float(np.interp(at, times, values))


def wait_until_ready(log: Path, process: subprocess.Popen[bytes]) -> None:
    while not re.search(r"^ready ", log.read_text(), re.MULTILINE):
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.2)


def compare(engine: str, sides: list[str], rows: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """For each side and round rows/s and CPU milliseconds a row."""
    figures: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = tiny_llama.make(work / "model")
        (work / "settings.yaml").write_text(json.dumps(settings(engine, model)))
        (work / "job.yaml").write_text(json.dumps(job()))
        (work / "corpus").mkdir()
        pq.write_table(pa.table({"text": prompts(rows)}), work / "corpus" / "part.parquet", row_group_size=2000)
        command = [sys.executable, "-m", "hycluster", "serve", str(work / "settings.yaml")]
        with running(command, env(work), work / "serve.log") as process:
            wait_until_ready(work / "serve.log", process)
            for number in range(rounds):
                # Each side is the first one as often as the others: the machine may become slower or faster.
                for side in sides if number % 2 == 0 else reversed(sides):
                    seconds, cpu_s = turn(side, work, work / f"out-{side}-{number}", process.pid)
                    figures[side].append((rows / seconds, 1000 * cpu_s / rows))
                    print(f"round {number + 1} {side}: {rows / seconds:.1f} rows/s, {seconds:.1f} s", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=sorted(ROWS), default="simulated")
    parser.add_argument("--rows", type=int, help=f"by default {ROWS}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["plain", "job"])
    parser.add_argument("--side", nargs=3, metavar=("SIDE", "CORPUS", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, corpus, out = args.side
        print(json.dumps(plain(Path(corpus), Path(out) if side == "plain+write" else None)))
        return
    rows = args.rows or ROWS[args.engine]
    figures = compare(args.engine, args.sides, rows, args.rounds)
    base, base_cpu_ms = map(statistics.median, zip(*figures[args.sides[0]], strict=True))
    print(f"\n{'side':<13}{'rows/s':>9}{'ratio':>8}{'CPU ms a row':>14}{'ratio':>8}")
    for side, measured in figures.items():
        speed, cpu_ms = map(statistics.median, zip(*measured, strict=True))
        print(f"{side:<13}{speed:>9.1f}{speed / base:>8.3f}{cpu_ms:>14.2f}{cpu_ms / base_cpu_ms:>8.3f}")


if __name__ == "__main__":
    main()
