from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hycluster.batch import ask as module
from hycluster.batch import generate, kept
from hycluster.batch.generate import Generate
from hycluster.batch.input.corpus import REFUSAL, REFUSAL_TYPE, ROW_ID, SHARD
from hycluster.batch.input.tables import pack
from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.record import Totals
from hycluster.batch.progress.terminal import RunProgress
from hycluster.batch.prompts import TemplatePrompt, prompt_of
from hycluster.batch.task import open_task
from hycluster.core import ColocationLoad, Generation, GenerationRequest, ReplicaLoad
from hycluster.errors import (
    HyclusterError,
    JobFailed,
    Overloaded,
    SettingsError,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)
from hycluster.gateway.bulk import RESERVE_ROWS, BulkLanes, EngineRoom
from tests.batch.conftest import MakeJob, broken_utf8
from tests.batch.stand_in import StandInGenerator
from tests.located import at
from tests.waiting import PATIENCE_S, until


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_BACKOFF_S", 0.001)


def block(texts: list[str | None] | pa.Array, shard_rows: int = 2) -> pa.Table:
    rows = range(len(texts))
    return pa.table(
        {
            "id": pa.array(rows, pa.int32()),
            "text": texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string()),
            ROW_ID: [f"f.parquet#{row}" for row in rows],
            SHARD: pa.array([row // shard_rows for row in rows], pa.int64()),
        }
    )


class Run:
    """A ``Generate`` outside of Ray."""

    def __init__(self, make_job: MakeJob, generator: Any, folder: Path, **changes: Any) -> None:
        @asynccontextmanager
        async def connect() -> AsyncIterator[Any]:
            self.opened += 1
            yield generator

        self.opened = 0
        self.reports: list[RunProgress] = []
        self.folder = folder
        output = OutputFolder(at(folder))
        output.claim({})
        job = make_job(**changes)
        self.stage = Generate(
            output,
            partial(open_task, job, connect),
            lambda process, progress: self.reports.append(progress),
            name=job.name,
            keep=True,
        )

    async def __call__(self, table: pa.Table) -> list[dict[str, Any]]:
        numbers = table.column(SHARD).to_pylist()
        starts = [row for row in range(len(numbers)) if not row or numbers[row] != numbers[row - 1]]
        ends = [*starts[1:], len(numbers)]
        block = pa.concat_tables(pack(table.slice(a, b - a)) for a, b in zip(starts, ends, strict=True))
        records = await self.stage(block)
        return [json.loads(text) for text in records.column("record").to_pylist()]

    async def close(self) -> None:
        """What the end of its process does for it: whose task is collected within another's loop is heard of there."""
        if self.stage._opened is not None:
            await self.stage._opened.__aexit__(None, None, None)

    def rows(self, records: list[dict[str, Any]], kind: str = "part") -> list[dict[str, Any]]:
        tables = [pq.read_table(self.folder / record[kind]["path"]) for record in records if record[kind]]
        return [row for table in tables for row in table.to_pylist()]


class Failing:
    """Raises the given errors, one a call, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0
        self.lanes = BulkLanes()

    lane = StandInGenerator.lane

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return await StandInGenerator().generate(request)


async def test_rows_keep_their_order_and_their_columns(make_job: MakeJob, tmp_path: Path) -> None:
    run = Run(make_job, StandInGenerator(), tmp_path / "out")
    texts: list[str | None] = [f"row {n}" for n in range(50)]
    records = await run(block(texts, shard_rows=20))
    assert [(record["shard"], record["rows"]) for record in records] == [(0, 20), (1, 20), (2, 10)]
    rows = run.rows(records)
    assert [row["text"] for row in rows] == texts
    assert rows[7] == {
        "id": 7,
        "text": "row 7",
        "row_id": "f.parquet#7",
        "output": "ROW 7",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 2,
    }
    assert run.opened == 1
    assert run.reports[0] == RunProgress(processes=1)
    assert run.reports[-1] == RunProgress(Totals(50, 0, 150, 100), processes=1)


@pytest.mark.parametrize(("most_bytes", "at_once"), [(1, 1), (1 << 20, 3)])
async def test_shards_of_very_large_cells_are_written_one_at_a_time(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_bytes: int, at_once: int
) -> None:
    """Writing one takes several times its size."""
    monkeypatch.setattr(generate, "SHARD_BYTES", most_bytes)
    commit, now, most, all_in = OutputFolder.commit, 0, 0, threading.Barrier(at_once)

    def watched(*arguments: Any, **named: Any) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        all_in.wait(PATIENCE_S)
        record = commit(*arguments, **named)
        now -= 1
        return record

    monkeypatch.setattr(OutputFolder, "commit", watched)
    run = Run(make_job, StandInGenerator(), tmp_path / "out")
    records = await run(block(["a", "b", "c"], shard_rows=1))
    assert [row["output"] for row in run.rows(records)] == ["A", "B", "C"]
    assert most == at_once
    await run.close()


async def test_rows_in_flight_are_bounded_across_blocks(make_job: MakeJob, tmp_path: Path) -> None:
    generator = StandInGenerator()
    run = Run(make_job, generator, tmp_path / "out", rows_in_flight=5)
    table = block([f"row {n}" for n in range(60)])
    await asyncio.gather(run(table.slice(0, 20)), run(table.slice(20, 20)), run(table.slice(40, 20)))
    assert generator.most_in_flight == 5
    assert run.opened == 1


async def test_rows_that_cannot_be_asked_are_quarantined(make_job: MakeJob, tmp_path: Path) -> None:
    run = Run(make_job, StandInGenerator(), tmp_path / "out")
    records = await run(block([None, "fine", "refuse me", " "], shard_rows=4))
    assert [row["row_id"] for row in run.rows(records)] == ["f.parquet#1"]
    assert [(row["id"], row["error_type"], row["error_message"]) for row in run.rows(records, "quarantine")] == [
        (0, "NullValue", "text: is null"),
        (2, "Refused", "prompt: refused by the stand-in"),
        (3, "EmptyValue", "text: is empty"),
    ]
    assert run.reports[0].done.rows == 0
    assert run.reports[-1].reasons == {"NullValue": 1, "Refused": 1, "EmptyValue": 1}


async def test_rows_that_were_refused_when_they_were_read_are_not_asked(make_job: MakeJob, tmp_path: Path) -> None:
    generator = Failing()
    run = Run(make_job, generator, tmp_path / "out")
    marks = [None, {"error_type": "UnreadableRows", "error_message": "row group 0 is damaged"}, None]
    table = block(["a", None, "c"], shard_rows=3).append_column(REFUSAL, pa.array(marks, REFUSAL_TYPE))
    records = await run(table)
    assert [row["output"] for row in run.rows(records)] == ["A", "C"]
    assert run.rows(records, "quarantine") == [
        {"id": 1, "text": None, "row_id": "f.parquet#1", **(marks[1] or {})},
    ]
    assert generator.calls == 2


async def test_an_unreadable_file_is_one_row_of_its_name(make_job: MakeJob, tmp_path: Path) -> None:
    run = Run(make_job, Failing(), tmp_path / "out")
    mark = {"error_type": "UnreadableFile", "error_message": "no"}
    table = pa.table({ROW_ID: ["a#7.parquet"], SHARD: [0], REFUSAL: pa.array([mark], REFUSAL_TYPE)})
    (record,) = await run(table)
    assert (record["input_file"], record["first_row"], record["rows"], record["part"]) == ("a#7.parquet", 0, 1, None)
    assert run.rows([record], "quarantine") == [{"row_id": "a#7.parquet", **mark}]


async def test_a_value_that_python_has_no_form_for_is_quarantined(make_job: MakeJob, tmp_path: Path) -> None:
    run = Run(make_job, StandInGenerator(), tmp_path / "out", prompt="{when}", input={"path": "x"})
    table = block(["a", "b"]).append_column("when", pa.array([0, 2**60], pa.timestamp("us")))
    records = await run(table)
    assert [row["id"] for row in run.rows(records)] == [0]
    (record,) = records
    quarantined = pq.read_table(tmp_path / "out" / record["quarantine"]["path"], columns=["id", "error_type"])
    assert quarantined.to_pylist() == [{"id": 1, "error_type": "WrongType"}]


async def test_text_that_is_not_utf8_is_quarantined_with_its_bytes(make_job: MakeJob, tmp_path: Path) -> None:
    run = Run(make_job, StandInGenerator(), tmp_path / "out")
    records = await run(block(broken_utf8([b"good", b"bad \xff\xfe", b"good too"]), shard_rows=3))
    assert [row["output"] for row in run.rows(records)] == ["GOOD", "GOOD TOO"]
    bad = pq.read_table(tmp_path / "out" / records[0]["quarantine"]["path"])
    assert bad.column("text").cast(pa.binary()).to_pylist() == [b"bad \xff\xfe"]
    assert bad.column("error_type").to_pylist() == ["InvalidUtf8"]


@pytest.mark.parametrize("error", [Unavailable("down"), ConnectionResetError("gone"), TimeoutError()])
async def test_engine_failures_are_retried(make_job: MakeJob, tmp_path: Path, error: Exception) -> None:
    generator = Failing(error, error)
    run = Run(make_job, generator, tmp_path / "out", retry_s=60)
    assert (await run(block(["x"])))[0]["quarantine"] is None
    assert generator.calls == 3


async def test_retries_are_told_while_no_row_gets_through(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "REPORT_EVERY_S", 0.005)
    run = Run(make_job, Failing(*[Unavailable("down")] * 6), tmp_path / "out", retry_s=60)
    await run(block(["x"]))
    assert any(said.done.rows == 0 and said.in_flight == 1 and said.retries for said in run.reports)
    assert run.reports[-1].retries == 6


async def test_shedding_is_waited_out_for_as_long_as_it_takes(make_job: MakeJob, tmp_path: Path) -> None:
    generator = Failing(*[Overloaded("later", retry_after_s=0.001)] * 20)
    await Run(make_job, generator, tmp_path / "out", retry_s=0)(block(["x"]))
    assert generator.calls == 21


@pytest.mark.parametrize(
    ("error", "becomes", "said"),
    [
        (Unavailable("down"), JobFailed, "row test-f.parquet#0: no engine could serve it for 0 s: down"),
        (UnknownModel("m", ["other"]), SettingsError, "model: 'm' is not served here"),
        (Unauthenticated("who?"), SettingsError, "who?"),
        (KeyError("bug"), JobFailed, "no engine could serve it for 0 s: KeyError: 'bug'"),
    ],
)
async def test_other_failures_end_the_job_and_commit_nothing(
    make_job: MakeJob, tmp_path: Path, error: Exception, becomes: type[HyclusterError], said: str
) -> None:
    run = Run(make_job, Failing(*[error] * 9), tmp_path / "out")
    with pytest.raises(becomes, match=said):
        await run(block(["x", "y"]))
    assert not list((tmp_path / "out").rglob("*.parquet"))


class Tripped(StandInGenerator):
    """Trips over one text, each time that it is asked; with an error that says nothing of whose it is."""

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        assert request.messages is not None
        if "odd" in request.messages[-1]["content"]:
            raise AssertionError("unexpected")
        await asyncio.sleep(0.01)
        return await super().generate(request)


@pytest.mark.parametrize("fine", [30, 0])
async def test_a_row_that_trips_the_front_end_is_quarantined(make_job: MakeJob, tmp_path: Path, fine: int) -> None:
    run = Run(make_job, Tripped(), tmp_path / "out", retry_s=60, rows_in_flight=2)
    records = await run(block(["odd", *["fine"] * fine], shard_rows=31))
    assert len(run.rows(records)) == fine
    (row,) = run.rows(records, "quarantine")
    assert (row["id"], row["error_type"]) == (0, "Refused")
    assert row["error_message"].startswith("AssertionError: unexpected, ")


@pytest.mark.parametrize("error", [AssertionError("no such part"), KeyError("role"), RecursionError("deep")])
async def test_a_row_whose_question_cannot_be_made_is_quarantined(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = Run(make_job, StandInGenerator(), tmp_path / "out")
    made = TemplatePrompt.messages

    def trips(self: TemplatePrompt, row: Any) -> Any:
        if row["text"] == "odd":
            raise error
        return made(self, row)

    monkeypatch.setattr(TemplatePrompt, "messages", trips)
    records = await run(block(["odd", "fine"]))
    assert [row["output"] for row in run.rows(records)] == ["FINE"]
    (row,) = run.rows(records, "quarantine")
    assert row["error_message"] == f"{type(error).__name__}: {error}"


async def test_numbers_read_as_short_as_their_type_makes_them(make_job: MakeJob, tmp_path: Path) -> None:
    run = Run(make_job, StandInGenerator(), tmp_path / "out", prompt="{n} {f}", input={"path": "x"})
    table = block(["a", "b"]).append_column("f", pa.array([0.1, 3e20], pa.float32()))
    table = table.append_column("n", pa.array([0.1, 2.5], pa.float64()))
    assert [row["output"] for row in run.rows(await run(table))] == ["0.1 0.1", "2.5 3E+20"]


async def test_a_time_zone_that_nobody_knows_is_the_rows_fault(make_job: MakeJob, tmp_path: Path) -> None:
    run = Run(make_job, StandInGenerator(), tmp_path / "out", prompt="{when}", input={"path": "x"})
    table = block(["a"]).append_column("when", pa.array([0], pa.timestamp("us", tz="Mars/Olympus")))
    (record,) = await run(table)
    kept = pq.read_table(tmp_path / "out" / record["quarantine"]["path"], columns=["error_type", "error_message"])
    ((kind, message),) = [tuple(row.values()) for row in kept.to_pylist()]
    assert kind == "WrongType"
    assert "Mars/Olympus" in message


async def test_a_shard_that_is_committed_is_not_generated_again(make_job: MakeJob, tmp_path: Path) -> None:
    generator = Failing()
    run = Run(make_job, generator, tmp_path / "out")
    table = block(["a", "b", "c", "d"])
    first = await run(table.slice(0, 2))
    assert (await run(table))[0] == first[0]
    assert generator.calls == 4


async def test_what_was_answered_is_not_asked_again_after_a_failure(make_job: MakeJob, tmp_path: Path) -> None:
    texts: list[str | None] = [*(f"row {n}" for n in range(20)), "refuse", f"die {tmp_path}"]
    # Long enough for all others to be answered before the job gives up.
    run = Run(make_job, first := Watched(), tmp_path / "out", rows_in_flight=30, retry_s=0.3)
    with pytest.raises(JobFailed, match="the stand-in is down"):
        await run(block(texts, shard_rows=22))
    await run.close()
    assert len(list((tmp_path / "out" / "_answers").iterdir())) == 1
    texts[-1] = f"die {tmp_path / 'up again'}"
    again = Run(make_job, second := Watched(), tmp_path / "out", rows_in_flight=30)
    records = await again(block(texts, shard_rows=22))
    assert [row["id"] for row in again.rows(records)] == [*range(20), 21]
    assert [row["error_type"] for row in again.rows(records, "quarantine")] == ["Refused"]
    answered = first.answered - {"test-f.parquet#21"}
    assert len(answered) == 20
    assert not answered & second.asked.keys()
    OutputFolder(at(tmp_path / "out")).finish({}, {})
    assert list((tmp_path / "out" / "_answers").iterdir()) == []


async def test_answers_are_kept_while_a_shard_is_in_work(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "REPORT_EVERY_S", 0.005)
    monkeypatch.setattr(kept, "KEEP_EVERY_S", 0.01)
    down = tmp_path / "down"
    down.touch()
    run = Run(make_job, StandInGenerator(), tmp_path / "out", retry_s=60)
    running = asyncio.create_task(run(block(["one", f"die {down}", "two"], shard_rows=3)))
    await until(lambda: list((tmp_path / "out").glob("_answers/*.json")))
    found = list((tmp_path / "out").glob("_answers/*.json"))
    assert not list((tmp_path / "out").glob("part-*"))
    held = json.loads(found[0].read_text())
    assert held.keys() <= {"f.parquet#0", "f.parquet#2"}
    down.unlink()
    await running
    found[0].write_text("{")
    # What is damaged is asked again.
    assert len(await Run(make_job, StandInGenerator(), tmp_path / "out")(block(["one"]).slice(0, 1))) == 1


class Watched(StandInGenerator):
    """Keeps the requests by their id."""

    def __init__(self) -> None:
        super().__init__(context_tokens=200)
        self.asked: dict[str | None, GenerationRequest] = {}
        self.answered: set[str | None] = set()

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        self.asked[request.request_id] = request
        answer = await super().generate(request)
        self.answered.add(request.request_id)
        return answer


LONG = " ".join(f"word{n}." for n in range(2000))
SUMMARIZE: dict[str, Any] = {"task": "summarize", "sampling": {"max_tokens": 20}}


async def test_texts_longer_than_the_context_are_summarized_by_parts(make_job: MakeJob, tmp_path: Path) -> None:
    generator = Watched()
    run = Run(make_job, generator, tmp_path / "out", rows_in_flight=2, summary={"keep_tree": True}, **SUMMARIZE)
    records = await run(block(["short", LONG, LONG, LONG, "short too"], shard_rows=5))
    assert generator.most_in_flight == 2
    short, long, *_ = rows = run.rows(records)
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4]
    assert short["tree"] is None
    nodes = json.loads(long["tree"])["nodes"]
    assert long["output"] == nodes[-1]["summary"]
    assert (nodes[0]["start"], nodes[-1]["start"], nodes[-1]["end"]) == (0, 0, len(LONG))
    for name in ("prompt_tokens", "completion_tokens"):
        assert long[name] == sum(node[name] for node in nodes)
        assert records[0][name] == sum(row[name] for row in rows)
    assert long["prompt_tokens"] > 2000
    asked = generator.asked["test-f.parquet#0"]
    assert asked.messages == prompt_of(make_job(**SUMMARIZE)).messages({"text": "short"})


async def test_the_tree_is_a_column_only_where_it_is_kept(make_job: MakeJob, tmp_path: Path) -> None:
    run = Run(make_job, Watched(), tmp_path / "out", **SUMMARIZE)
    (row,) = run.rows(await run(block([LONG])))
    assert row["finish_reason"] == "length"
    assert "tree" not in row


async def test_a_long_text_with_a_refused_part_is_quarantined_and_the_job_goes_on(
    make_job: MakeJob, tmp_path: Path
) -> None:
    run = Run(make_job, Watched(), tmp_path / "out", rows_in_flight=2, **SUMMARIZE)
    records = await run(block([LONG + " refuse " + LONG, LONG], shard_rows=2))
    assert [row["id"] for row in run.rows(records)] == [1]
    assert [row["error_message"] for row in run.rows(records, "quarantine")] == ["prompt: refused by the stand-in"]


async def test_a_context_too_small_for_the_job_ends_it(make_job: MakeJob, tmp_path: Path) -> None:
    run = Run(make_job, Watched(), tmp_path / "out", summary={"part_tokens": 500}, **SUMMARIZE)
    with pytest.raises(SettingsError, match=r"^summary.part_tokens: 500 is not allowed; must be at most 1\d\d"):
        await run(block([LONG]))


class Recording(StandInGenerator):
    """Keeps the order of the requests."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        assert request.request_id is not None
        self.order.append(request.request_id.rpartition("#")[2])
        return await super().generate(request)


async def test_rows_about_one_document_are_asked_together_and_written_in_their_order(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "ORDERED_ROWS", 6)
    generator = Recording()
    run = Run(make_job, generator, tmp_path / "out", rows_in_flight=1)
    documents = [f"{letter} " * 400 for letter in "ab"]
    texts: list[str | None] = [f"{documents[n % 2]} question {n}" for n in range(12)]
    texts[3] = None
    records = await run(block(texts, shard_rows=3))
    # Six rows are looked at together. The one that can't be asked has no beginning.
    assert generator.order == ["0", "2", "4", "1", "5", "6", "8", "10", "7", "9", "11"]
    assert [row["id"] for row in run.rows(records)] == [n for n in range(12) if n != 3]
    assert [row["text"] for row in run.rows(records)] == [text for text in texts if text]
    assert [record["shard"] for record in records] == [0, 1, 2, 3]


async def test_rows_that_have_nothing_in_common_are_asked_in_their_order(make_job: MakeJob, tmp_path: Path) -> None:
    generator = Recording()
    run = Run(make_job, generator, tmp_path / "out", rows_in_flight=1)
    await run(block([f"row {n}" for n in range(9, 0, -1)]))
    assert generator.order == [str(n) for n in range(9)]


async def test_rows_in_flight_follow_what_the_engines_have_room_for(make_job: MakeJob, tmp_path: Path) -> None:
    generator = StandInGenerator()
    engine = EngineRoom()
    slots = ColocationLoad(bulk_running=3)
    engine.note(ReplicaLoad(running=3, most_running=3, colocation=slots), 0, 0.0)
    generator.lanes.hear([engine], {})
    run = Run(make_job, generator, tmp_path / "out")
    await run(block([f"row {n}" for n in range(60)]))
    assert generator.most_in_flight == 3 + RESERVE_ROWS


async def test_a_job_that_the_engines_have_no_time_for_says_so(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "REPORT_EVERY_S", 0.005)

    class Busy(StandInGenerator):
        async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
            self.lanes.starved = True
            await asyncio.sleep(0.05)
            self.lanes.starved = False
            return await super().generate(request)

    run = Run(make_job, Busy(), tmp_path / "out", rows_in_flight=2)
    await run(block(["a", "b", "c"]))
    assert any(said.waiting and said.parked == said.in_flight == 2 for said in run.reports)
    assert not run.reports[-1].waiting
