"""From ``hycluster batch run`` to the first committed row of ten, beside a running service.

    python -m bench.first_row --jobs 3 --sides .,/path/to/another/worktree

Each side is a work tree: its service is started and stays up, and the same small job is run there some times, in
processes of its own, as a user does it; sides take turns, so that a machine's ups and downs hit all alike. What is
measured from the command's start: until the first shard's record is there (ten rows are one shard), and until the
command ends. The model has next to no size, so what is left is all that is around the engine; the figures are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bench import tiny_llama
from bench.gateway import MODEL, free_port, running, wait_until_served

ROWS = 10


def job(folder: Path) -> Path:
    pq.write_table(pa.table({"text": [f"row {n} of {ROWS}" for n in range(ROWS)]}), folder / "in.parquet")
    settings = {
        "name": "first-row",
        "model": MODEL,
        "task": "generate",
        "prompt": "Say it again: {text}",
        "input": {"path": str(folder / "in.parquet")},
        "sampling": {"max_tokens": 16, "temperature": 0},
    }
    (folder / "job.yaml").write_text(json.dumps(settings))
    return folder / "job.yaml"


def run(job_file: Path, out: Path, env: dict[str, str], tree: str) -> tuple[float, float]:
    """Seconds until the first record, and until the command has ended."""
    command = [sys.executable, "-m", "hycluster", "batch", "run", str(job_file), "--output", str(out)]
    begun_s = time.monotonic()
    first_s: float | None = None
    with (out.parent / "jobs.log").open("ab") as log:
        process = subprocess.Popen(command, env=env, cwd=tree, stdout=log, stderr=log)
        while process.poll() is None:
            if first_s is None and any((out / "_shards").glob("0*.json")):
                first_s = time.monotonic() - begun_s
            time.sleep(0.01)
    if process.returncode or first_s is None:
        raise SystemExit(f"the job ended with {process.returncode}; see {out.parent / 'jobs.log'}")
    return first_s, time.monotonic() - begun_s


@contextlib.contextmanager
def served(tree: str, work: Path, model: Path) -> Iterator[Callable[[], tuple[float, float]]]:
    """One side's service, warm; yields what runs a job beside it."""
    work.mkdir(parents=True)
    settings = {
        "data_plane": {"host": "127.0.0.1"},
        "models": [
            {
                "name": MODEL,
                "source": str(model),
                "engine": {"max_model_len": 2048, "max_num_seqs": 64},
                "hardware": {"cpus": 1, "kv_cache_gib": 1},
            }
        ],
    }
    (work / "settings.json").write_text(json.dumps(settings))
    env = {"HYCLUSTER_HOME": str(work / "home"), "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": tree}
    port = free_port()
    command = [sys.executable, "-m", "hycluster", "serve", str(work / "settings.json")]
    ports = ["--http-port", str(port), "--grpc-port", str(free_port())]
    with running([*command, *ports], env, work / "serve.log", tree) as service:
        wait_until_served(f"http://127.0.0.1:{port}", service)
        job_file, numbers = job(work), count()
        yield lambda: run(job_file, work / f"out-{next(numbers)}", {**os.environ, **env}, tree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=3, help="of each side, in turn")
    parser.add_argument("--sides", default=".", help="work trees, with commas between them")
    args = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in args.sides.split(",")}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = tiny_llama.make(Path(folder) / "model")
        jobs = {
            side: stack.enter_context(served(str(Path(side).resolve()), Path(folder) / f"side-{number}", model))
            for number, side in enumerate(times)
        }
        for turn in range(args.jobs):
            for side in list(times)[:: 1 if turn % 2 else -1]:
                first, end = jobs[side]()
                times[side].append((first, end))
                print(f"turn {turn + 1}: {side}: first row after {first:.1f} s, end after {end:.1f} s", flush=True)
    for side, found in times.items():
        first, end = (statistics.median(kind) for kind in zip(*found, strict=True))
        print(f"{side}: medians of {args.jobs}: first row after {first:.1f} s, end after {end:.1f} s")


if __name__ == "__main__":
    main()
