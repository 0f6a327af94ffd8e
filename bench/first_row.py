"""From ``hycluster batch run`` to the first committed row of ten, beside a running service.

    python -m bench.first_row --jobs 3 --sides .,/path/to/another/worktree

Each side is a work tree: its service is started and warmed up, then the same small job is run there some times, one
after the other, in processes of their own, as a user does it. What is measured from the command's start: until the
first shard's record is there (ten rows are one shard), and until the command ends. The model has next to no size, so
what is left is all that is around the engine; the figures are medians. A side whose job has a gateway of its own from
the beginning imports vLLM within that time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
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


def measure(tree: str, jobs: int, work: Path, model: Path) -> list[tuple[float, float]]:
    """One side: its service, and the jobs beside it."""
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
        job_file = job(work)
        found = []
        for number in range(jobs):
            found.append(run(job_file, work / f"out-{number}", {**os.environ, **env}, tree))
            print(f"{tree}: job {number + 1}: first row {found[-1][0]:.1f} s, end {found[-1][1]:.1f} s", flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--sides", default=".", help="work trees, with commas between them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_llama.make(Path(folder) / "model")
        for number, side in enumerate(args.sides.split(",")):
            times = measure(str(Path(side).resolve()), args.jobs, Path(folder) / f"side-{number}", model)
            first, end = (statistics.median(kind) for kind in zip(*times, strict=True))
            print(f"{side}: median of {args.jobs} jobs: first row after {first:.1f} s, end after {end:.1f} s")


if __name__ == "__main__":
    main()
