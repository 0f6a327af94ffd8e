"""Parquet files of strangers, each through a job of its own and ``batch verify``, and compared by other software.

    python -m bench.strange_files FOLDER... --json found.json

Each ``*.parquet`` and ``*.parquet.*`` below the folders, and files named ``*parquet*fuzz*`` or the like with ``--all``,
is put beside a file that is whole, so that a job has something to do whatever is wrong with the odd one. The job is the
real one from plan to ``_SUCCESS`` but for Ray Data, which carries rows unseen: a process of its own does one file after
the other and is started again when a file has ended it. The engine is simulated: every row gets the same words.

Then DuckDB, if it is installed, or else pyarrow reads the file and the parts and compares the columns, knowing nothing
of how the job read them. What a line says: ``same`` (all rows are in the output, unchanged), ``quarantined`` (some or
all of them are there), ``refused`` (exit code 2, with what was said), or what must not be: ``CHANGED``, ``FAULTS`` (of
verify), ``FAILED`` (exit code 1), ``CRASHED``, ``SLOW``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import re
import shutil
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench.batch_scale import MODEL, SimulatedGenerator

GOOD = pa.table({"good": ["a", None, "c"]})
BAD = ("CHANGED", "FAULTS", "FAILED", "CRASHED", "SLOW")
JOB = {"name": "strange", "model": MODEL, "task": "generate", "prompt": "Say something.", "constant_prompt": True}


def peak_mib(anew: bool = False) -> float:
    """Peak RSS of this process since it was last asked for anew."""
    status = Path("/proc/self/status").read_text()
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024


def through(file: Path, work: Path) -> dict[str, Any]:
    """One file; what became of it."""
    from hycluster.batch.generate import Generate
    from hycluster.batch.input.apart import footers_apart
    from hycluster.batch.input.corpus import plan_shards, read_shards, spans
    from hycluster.batch.input.tables import pack
    from hycluster.batch.job import Job
    from hycluster.batch.output.commit import OutputFolder
    from hycluster.batch.output.identity import identity
    from hycluster.batch.output.record import Totals
    from hycluster.batch.output.verify import verify_output
    from hycluster.batch.prompts import prompt_of
    from hycluster.batch.task import open_task
    from hycluster.storage import locate

    corpus_path, out = work / "corpus", work / "out"
    corpus_path.mkdir()
    pq.write_table(GOOD, corpus_path / "a-good.parquet")
    odd = "odd.parquet"
    shutil.copyfile(file, corpus_path / odd)
    job = Job.model_validate(
        {**JOB, "input": {"path": str(corpus_path)}, "output": {"path": str(out)}, "max_quarantined_fraction": 1}
    )
    corpus = plan_shards(
        locate(str(corpus_path), "input.path"),
        shard_rows=job.shard_rows,
        check=prompt_of(job).check,
        read_footers=footers_apart,
    )
    output = OutputFolder(locate(str(out), "output.path"))
    mine = identity(job, corpus)
    output.claim(mine)
    generate = Generate(
        output, lambda: open_task(job, lambda: nullcontext(SimulatedGenerator())), _say_nothing, name="s"
    )

    async def run() -> None:
        for span in spans(corpus.shards()):
            for shard in read_shards(corpus.folder, span):
                await generate(pack(shard))

    asyncio.run(run())
    records = list(output.records())
    totals = Totals(
        *(
            sum(getattr(r, name) for r in records)
            for name in ("rows", "quarantined", "prompt_tokens", "completion_tokens")
        )
    )
    output.finish(mine, asdict(totals))
    verdict = verify_output(locate(str(out), "OUTPUT"), locate(str(corpus_path), "input.path"))
    found: dict[str, Any] = {"rows": totals.rows - GOOD.num_rows, "quarantined": totals.quarantined}
    if verdict.fault_count:
        return {**found, "verdict": "FAULTS", "said": verdict.lines()[:3]}
    if totals.quarantined:
        names = [r.quarantine.path for r in records if r.quarantine]
        said = pq.ParquetFile(out / names[0]).read().column("error_message")[0].as_py()
        found["said"] = said
    parts = [out / r.part.path for r in records if r.part and r.input_file == odd]
    changed = compared(corpus_path / odd, parts)
    found["compared_by"] = changed[0]
    if changed[1]:
        return {**found, "verdict": "CHANGED", "said": changed[1]}
    return {**found, "verdict": "quarantined" if totals.quarantined else "same"}


def compared(odd: Path, parts: list[Path]) -> tuple[str, str | None]:
    """Who compared, and which column is not what it was in rows that are in the parts."""
    if not parts:
        return "nobody: no rows", None
    try:
        return "duckdb", by_duckdb(odd, parts)
    except Exception as why:
        by = f"pyarrow ({type(why).__name__}: {str(why).splitlines()[0][:120]})"
    try:
        return by, by_pyarrow(odd, parts)
    except Exception as why:
        return f"nobody: {type(why).__name__}: {str(why).splitlines()[0][:120]}; {by}", None


def by_duckdb(odd: Path, parts: list[Path]) -> str | None:
    import duckdb

    db = duckdb.connect()
    db.execute("SET threads=1; SET TimeZone='UTC'")
    listed = "[" + ",".join(f"'{part}'" for part in parts) + "]"
    before = f"(SELECT *, file_row_number AS n__ FROM read_parquet('{odd}', file_row_number=true))"
    row_id = [name for name, *_ in db.execute(f"DESCRIBE SELECT * FROM read_parquet({listed})").fetchall()]
    id_name = next(name for name in reversed(row_id) if re.fullmatch(r"row_id(_\d+)?", name))
    after = f"(SELECT *, CAST(split_part(\"{id_name}\", '#', -1) AS BIGINT) AS n__ FROM read_parquet({listed}))"
    kinds: list[dict[str, str]] = [{}, {}]
    for place, source in enumerate((f"'{odd}'", listed)):
        kinds[place] = dict(row[:2] for row in db.execute(f"DESCRIBE SELECT * FROM read_parquet({source})").fetchall())
    for name, kind in kinds[0].items():
        if kind == "VARIANT" != kinds[1].get(name):
            raise TypeError(f"{name}: VARIANT is what its bytes are stored as, for pyarrow")
    for name in kinds[0]:
        quoted = '"' + name.replace('"', '""') + '"'
        ((differ,),) = db.execute(
            f"SELECT count(*) FROM {before} a JOIN {after} b USING (n__) WHERE a.{quoted} IS DISTINCT FROM b.{quoted}"
        ).fetchall()
        if differ:
            return f"{name}: {differ} values"
    ((both,),) = db.execute(f"SELECT count(*) FROM {before} a JOIN {after} b USING (n__)").fetchall()
    ((out,),) = db.execute(f"SELECT count(*) FROM {after}").fetchall()
    return None if both == out else f"{out} rows, of which {both} are the input's"


def by_pyarrow(odd: Path, parts: list[Path]) -> str | None:
    before = pq.ParquetFile(odd).read()
    after = [pq.ParquetFile(part).read() for part in parts]
    for place, name in enumerate(before.schema.names):
        found = [value for part in after for value in part.column(place).to_pylist()]
        kept = [int(i.rpartition("#")[2]) for part in after for i in part.column(len(before.schema.names)).to_pylist()]
        expected = before.column(place).to_pylist()
        if repr([expected[row] for row in kept]) != repr(found):
            return str(name)
    return None


def _say_nothing(*_: object) -> None:
    pass


def work_off(calls: Connection[Any, Any]) -> None:
    """The process that does the files."""
    from hycluster.errors import HyclusterError

    while True:
        file = calls.recv()
        with tempfile.TemporaryDirectory() as folder:
            peak_mib(anew=True)
            before, begun_s = peak_mib(), time.monotonic()
            try:
                found = through(Path(file), Path(folder))
            except HyclusterError as error:
                found = {"verdict": "refused" if error.exit_code == 2 else "FAILED", "said": error.message}
            except Exception as error:
                found = {"verdict": "FAILED", "said": f"{type(error).__name__}: {error}"[:300]}
            found |= {"seconds": round(time.monotonic() - begun_s, 2), "peak_mib": round(peak_mib() - before)}
        calls.send(found)


class Worker:
    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        spawn = multiprocessing.get_context("spawn")
        self._here, there = spawn.Pipe()
        self._process = spawn.Process(target=work_off, args=(there,), daemon=True)
        self._process.start()
        there.close()

    def ask(self, file: Path) -> tuple[dict[str, Any], bool]:
        """What became of it, and whether the process lives."""
        self._here.send(str(file))
        try:
            if self._here.poll(self._limit_s):
                return self._here.recv(), True
        except EOFError:
            self._process.join()
            return {"verdict": "CRASHED", "said": f"exit code {self._process.exitcode}"}, False
        self.end()
        return {"verdict": "SLOW", "said": f"more than {self._limit_s:g} s"}, False

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--all", action="store_true", help="every file, whatever its name")
    parser.add_argument("--limit-s", type=float, default=300, help="for a file; some have a million rows in 8 KB")
    parser.add_argument("--json", type=Path, help="write what was found here")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    worker, begun_s = Worker(args.limit_s), time.monotonic()
    for folder in args.folders:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        for file in files:
            if not args.all and ".parquet" not in file.name and file.suffix != ".parq":
                continue
            found[str(file)], lives = worker.ask(file)
            worker = worker if lives else Worker(args.limit_s)
            if found[str(file)]["verdict"] in BAD:
                print(f"{file}: {found[str(file)]}", flush=True)
    worker.end()
    verdicts = Counter(one["verdict"] for one in found.values())
    by = Counter(one.get("compared_by", "-").partition(" ")[0].rstrip(":") for one in found.values())
    slowest = max(found, key=lambda file: found[file].get("seconds", 0))
    largest = max(found, key=lambda file: found[file].get("peak_mib", 0))
    print(f"{len(found)} files in {time.monotonic() - begun_s:.0f} s: {dict(verdicts)}; compared by {dict(by)}")
    print(f"slowest: {slowest}: {found[slowest]}")
    print(f"most memory: {largest}: {found[largest]}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
