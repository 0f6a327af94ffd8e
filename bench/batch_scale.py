"""What a batch job of many rows takes of its driver: peak RSS at 10^5, 10^6 and 10^7 rows.

    python -m bench.batch_scale --rows 100000 1000000

The job is the real one from plan to ``_SUCCESS``, in a process and a Ray cluster of its own, and ``batch verify``
reads back what it wrote, in another. Only the engine is simulated: it answers each row with four words within the
process that feeds engines, without any wait, so that what remains is what the job itself costs. ``--kill`` ends the
whole job by SIGKILL once about half of the rows are committed, and runs it again.

Peaks of the driver and the verifier are what the kernel says; that of the process that asks is sampled ten times a
second and leaves Ray's object store out, through which it reads its rows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import pyarrow as pa
import pyarrow.parquet as pq

from hycluster.batch.job import Job
from hycluster.batch.task import Connect
from hycluster.core import ChatFields, Generation, GenerationRequest, ModelCard, Output, Usage
from hycluster.gateway.bulk import FIXED_ROWS, BulkLane, BulkLanes

MODEL = "simulated"
FILE_ROWS = 250_000
ROW_GROUP_ROWS = 50_000
MIB = 1 << 20


class SimulatedGenerator:
    """Answers at once, always the same."""

    def __init__(self) -> None:
        self._lanes = BulkLanes()

    def lane(self, model: str, job: str, most: int | None = None, fixed: int = FIXED_ROWS) -> BulkLane:
        return self._lanes.lane(job, most, fixed)

    async def models(self) -> list[ModelCard]:
        return [ModelCard(MODEL, 4096, 1)]

    async def tokenize(
        self,
        model: str,
        *,
        prompt: str | None = None,
        messages: list[dict[str, Any]] | None = None,
        **chat: Unpack[ChatFields],
    ) -> list[int]:
        return [0]

    def token_counter(self, model: str) -> Callable[[Sequence[str]], list[int]]:
        return lambda texts: [len(text) // 4 for text in texts]

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        return Generation(
            request.request_id or "", MODEL, [Output(0, "an answer of words", [1, 2, 3, 4], "stop")], Usage(12, 4)
        )


@asynccontextmanager
async def open_simulated(pids: str) -> AsyncIterator[SimulatedGenerator]:
    (Path(pids) / str(os.getpid())).touch()
    yield SimulatedGenerator()


@contextmanager
def simulated_engines(pids: str, job: Job) -> Iterator[Connect]:
    """In the place of the engines that a job would start or join; the process that asks leaves its pid."""
    import logging

    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield partial(open_simulated, pids)


def write_corpus(folder: Path, rows: int) -> None:
    """Files of 250,000 rows, row groups of 50,000; texts of about 40 characters and a number."""
    folder.mkdir()
    for first in range(0, rows, FILE_ROWS):
        numbers = range(first, min(rows, first + FILE_ROWS))
        texts = pa.array([f"row {number} of a corpus of short texts" for number in numbers])
        table = pa.table({"id": pa.array(numbers, pa.int64()), "text": texts})
        pq.write_table(table, folder / f"{first // FILE_ROWS:05d}.parquet", row_group_size=ROW_GROUP_ROWS)


def job(work: Path, shard_rows: int) -> dict[str, Any]:
    return {
        "name": "scale",
        "model": MODEL,
        "task": "generate",
        "input": {"path": str(work / "corpus"), "columns": {"text": "text"}},
        "output": {"path": str(work / "out")},
        "shard_rows": shard_rows,
    }


def peak_mib() -> float:
    """Peak RSS of this process."""
    return _status_mib("self", "VmHWM")


def own_mib(pid: str) -> float:
    """RSS of a process now, less the pages of Ray's object store, which it shares with all others."""
    return _status_mib(pid, "RssAnon") + _status_mib(pid, "RssFile")


def _status_mib(pid: str, name: str) -> float:
    return int(re.findall(rf"{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) * 1024 / MIB


def child(command: str, work: Path) -> None:
    """The driver, or the one who verifies; prints its own peak RSS."""
    if command == "run":
        from hycluster.batch.run import run_job

        (work / "pids").mkdir(exist_ok=True)
        settings = json.loads((work / "job.json").read_text())
        run_job(Job.model_validate(settings), engines=partial(simulated_engines, str(work / "pids")))
    else:
        from hycluster.batch.output.verify import verify_output
        from hycluster.storage import locate

        verdict = verify_output(*(locate(str(work / place), place) for place in ("out", "corpus")))
        print("\n".join(verdict.lines()))
        if verdict.fault_count:
            raise SystemExit(1)
    print(f"peak RSS {peak_mib()} MiB")


def watched(command: str, work: Path, until: Callable[[], bool] | None = None) -> dict[str, float]:
    """Run a child to its end, or kill it in between; its seconds, its peak RSS and that of the generate process."""
    with (work / "log").open("a+") as log:
        begun_s = time.monotonic()
        here = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.batch_scale", "--child", command, str(work)],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        generate = driver = 0.0
        try:
            while process.poll() is None:
                time.sleep(0.1)
                for path in (work / "pids").glob("*"):
                    try:
                        generate = max(generate, own_mib(path.name))
                    except (OSError, IndexError):
                        # It has ended.
                        path.unlink()
                if until is not None and until():
                    driver = _status_mib(str(process.pid), "VmHWM")
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        seconds = time.monotonic() - begun_s
        log.seek(here)
        said = log.read()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(said)
    found = re.findall(r"peak RSS (\S+) MiB", said)
    return {"s": seconds, "peak_mib": float(found[-1]) if found else driver, "generate_peak_mib": generate}


def committed(work: Path) -> int:
    """Shards that have a record."""
    try:
        return len(os.listdir(work / "out" / "_shards"))
    except FileNotFoundError:
        return 0


def measure(rows: int, shard_rows: int, kill: bool, keep: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    with tempfile.TemporaryDirectory(dir=keep, ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        write_corpus(work / "corpus", rows)
        (work / "job.json").write_text(json.dumps(job(work, shard_rows)))
        shards = -(-min(rows, FILE_ROWS) // shard_rows) * -(-rows // FILE_ROWS)
        if kill:
            yield "killed halfway", {"rows": rows, **watched("run", work, lambda: committed(work) > shards / 2)}
            # Ray's processes commit for a moment after their driver is gone.
            at = -1
            while at != committed(work):
                at = committed(work)
                time.sleep(3)
            begun = time.monotonic()
            resumed_s: list[float] = []

            def goes_on() -> bool:
                if not resumed_s and committed(work) > at:
                    resumed_s.append(time.monotonic() - begun)
                return False

            again = watched("run", work, goes_on)
            yield "run again", {"rows": rows, "shards": shards, **again, "goes_on_after_s": resumed_s[0]}
        else:
            yield "run", {"rows": rows, "shards": shards, **watched("run", work)}
        yield "verify", {"rows": rows, **watched("verify", work)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--shard-rows", type=int, default=256, help="256 is what a job has by default")
    parser.add_argument("--kill", action="store_true", help="kill each job halfway and run it again")
    parser.add_argument("--folder", type=Path, help="where to work; some 400 bytes a row of disk are needed")
    parser.add_argument("--child", nargs=2, metavar=("COMMAND", "WORK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]))
        return
    columns = f"{'rows':>9}{'shards':>8}{'seconds':>9}{'rows/s':>8}{'peak RSS MiB':>14}{'of generate':>13}"
    print(f"{'what':<16}{columns}", flush=True)
    for rows in args.rows:
        for what, found in measure(rows, args.shard_rows, args.kill, args.folder):
            line = f"{what:<16}{rows:>9}{found.get('shards', ''):>8}{found['s']:>9.1f}{rows / found['s']:>8.0f}"
            line += f"{found['peak_mib']:>14.1f}{found['generate_peak_mib']:>13.1f}"
            if "goes_on_after_s" in found:
                line += f"  first new shard after {found['goes_on_after_s']:.1f} s"
            print(line, flush=True)


if __name__ == "__main__":
    main()
