"""One batch end to end over an app that needs no engine; what is left after any failure is finished by the next run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from hycluster.auth.caller import Caller
from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.lease import Lease
from hycluster.batch_api import runner as runner_module
from hycluster.batch_api.executor import StoreWatch
from hycluster.batch_api.ledger_lines import LedgerLines
from hycluster.batch_api.lines import BatchEngines
from hycluster.batch_api.records import Batch, State, batch_object
from hycluster.batch_api.runner import Runner
from hycluster.batch_api.store import Store
from hycluster.core import ColocationLoad, Priority, ReplicaLoad
from hycluster.errors import JobFailed, NotFound
from hycluster.gateway.bulk import FIXED_ROWS, RESERVE_ROWS, EngineRoom
from hycluster.ledger.books import Books
from hycluster.ledger.usage import sum_usage
from hycluster.settings.ingress import Batches
from tests.batch_api.stand_in import StandIn, jsonl, line, lines_of, submit
from tests.object_store import ObjectStore
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def api() -> StandIn:
    return StandIn()


def runner(store: Store, settings: Batches, api: StandIn) -> Runner:
    return Runner(store, settings, api.connect)


def worked(store: Store, batch: Batch) -> bool:
    """Whether the batch's work folder is there."""
    return Path(store.work(batch.id).root).exists()


def ids(lines: list[dict[str, Any]]) -> list[str]:
    return [each["custom_id"] for each in lines]


async def test_all_lines_are_answered_in_order(store: Store, settings: Batches, api: StandIn) -> None:
    batch = submit(store, jsonl(50), metadata={"a": "b"}, output_expires_after_s=7200)
    await runner(store, settings, api).run(batch.id)
    state = store.state(batch.id)
    assert (state.status, state.total, state.completed, state.failed) == ("completed", 50, 50, 0)
    assert (state.model, state.error_file_id, state.errors) == ("m", None, ())
    assert state.usage is not None
    assert (state.usage.input_tokens, state.usage.output_tokens, state.usage.cached_tokens) == (150, 100, 50)
    out = lines_of(store, state.output_file_id)
    assert ids(out) == [f"c{n}" for n in range(50)]
    assert len({each["id"] for each in out}) == 50
    for number, each in enumerate(out):
        assert set(each) == {"id", "custom_id", "response", "error"}
        assert each["error"] is None
        assert each["id"] == f"batch_req_{each['response']['request_id']}"
        assert each["response"]["status_code"] == 200
        assert each["response"]["body"]["choices"][0]["message"]["content"] == f"p{number}\u2028!"
    file = store.file(state.output_file_id or "")
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert file.expires_at == file.created_at + 7200
    # Nothing of the work is left.
    assert store.open_batches() == []
    assert not worked(store, batch)
    assert api.most_at_once <= (settings.lines_in_flight or 0)


async def test_a_line_can_not_raise_its_priority(store: Store, settings: Batches, api: StandIn) -> None:
    batch = submit(store, jsonl(2, priority=-5))
    await runner(store, settings, api).run(batch.id)
    assert {body["priority"] for body in api.bodies.values()} == {int(Priority.BATCH)}


async def test_a_lines_fault_is_its_own(store: Store, settings: Batches, api: StandIn) -> None:
    api.statuses = {"p2": [400], "p3": [404], "p5": [500, 500, 500]}
    text = jsonl(8) + line("s", body={"prompt": "s", "stream": True})
    batch = submit(store, text)
    await runner(store, settings, api).run(batch.id)
    state = store.state(batch.id)
    assert (state.status, state.completed, state.failed) == ("completed", 5 + 0, 4)
    assert ids(lines_of(store, state.output_file_id)) == ["c0", "c1", "c4", "c6", "c7"]
    errors = lines_of(store, state.error_file_id)
    assert ids(errors) == ["c2", "c3", "c5", "s"]
    assert [each["response"]["status_code"] for each in errors] == [400, 404, 500, 400]
    assert errors[0]["response"]["body"]["error"]["message"] == "status 400"
    assert "stream: True is not allowed" in errors[3]["response"]["body"]["error"]["message"]
    assert "s" not in api.asked


async def test_what_is_not_the_lines_fault_is_tried_again(store: Store, settings: Batches, api: StandIn) -> None:
    api.statuses = {"p1": [429, 503], "p2": [500, 503], "p3": [502]}
    batch = submit(store, jsonl(4))
    await runner(store, settings, api).run(batch.id)
    state = store.state(batch.id)
    assert (state.completed, state.failed) == (4, 0)
    assert dict(api.asked) == {"p0": 1, "p1": 3, "p2": 3, "p3": 2}


async def test_a_line_that_kills_replicas_is_given_up(store: Store, settings: Batches, api: StandIn) -> None:
    api.kills = {"p1"}
    batch = submit(store, jsonl(4))
    await runner(store, settings, api).run(batch.id)
    state = store.state(batch.id)
    assert (state.status, state.completed, state.failed) == ("completed", 3, 1)
    (given_up,) = lines_of(store, state.error_file_id)
    assert (given_up["custom_id"], given_up["response"], given_up["error"]["code"]) == ("c1", None, "Poison")
    assert api.asked["p1"] == 1


async def test_a_batch_with_a_wrong_line_asks_nothing(store: Store, settings: Batches, api: StandIn) -> None:
    batch = submit(store, f"{jsonl(3)}nonsense\n{line('c0')}\n")
    await runner(store, settings, api).run(batch.id)
    state = store.state(batch.id)
    assert (state.status, state.output_file_id) == ("failed", None)
    assert [(error.line, error.code) for error in state.errors] == [
        (4, "invalid_json_line"),
        (5, "duplicate_custom_id"),
    ]
    assert not api.asked
    assert not worked(store, batch)


async def test_a_batch_whose_file_was_deleted(store: Store, settings: Batches, api: StandIn) -> None:
    batch = submit(store, jsonl(3))
    store.delete_file(batch.input_file_id)
    await runner(store, settings, api).run(batch.id)
    assert [error.code for error in store.state(batch.id).errors] == ["input_file_not_found"]


async def test_a_mark_without_a_batch_is_left_alone(store: Store, settings: Batches, api: StandIn) -> None:
    batch = submit(store, jsonl(3))
    (Path(store.folder.root) / "batches" / f"{batch.id}.json").unlink()
    await runner(store, settings, api).run(batch.id)
    assert store.open_batches() == [batch.id]


async def test_cancel_keeps_what_is_answered(store: Store, settings: Batches, api: StandIn) -> None:
    # One of the first shard's lines never ends.
    api.held = {"p2"}
    batch = submit(store, jsonl(200))
    running = asyncio.create_task(runner(store, settings, api).run(batch.id))
    await until(lambda: api.asked["p10"])
    await until(lambda: store.state(batch.id).completed > 0)
    store.cancel(batch.id)
    async with asyncio.timeout(PATIENCE_S):
        await running
    state = store.state(batch.id)
    assert state.status == "cancelled"
    assert "p2" in api.aborted
    out, errors = lines_of(store, state.output_file_id), lines_of(store, state.error_file_id)
    assert "c0" in ids(out)
    assert "c2" in ids(errors)
    assert sorted(ids(out + errors)) == sorted(f"c{n}" for n in range(200))
    assert ids(errors) == sorted(ids(errors), key=lambda name: int(name[1:]))
    assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}
    assert (state.completed, state.failed) == (len(out), 0)
    # Lines that were answered were not asked in vain.
    assert set(api.asked) - set(api.aborted) <= {f"p{name[1:]}" for name in ids(out)}


def reported(api: StandIn, running: int, slots: int) -> EngineRoom:
    """An engine that has said this of itself."""
    engine = EngineRoom()
    load = ReplicaLoad(running=running, most_running=slots, colocation=ColocationLoad(bulk_running=running))
    engine.note(load, running, 0.0)
    api.lanes.hear([engine], {})
    return engine


@pytest.fixture
def followed(settings: Batches) -> Batches:
    """Lines in flight are what engines have room for."""
    return settings.model_copy(update={"lines_in_flight": None})


async def test_lines_in_flight_follow_what_the_engines_have_room_for(
    store: Store, followed: Batches, api: StandIn
) -> None:
    reported(api, 10, 10)
    batch = submit(store, jsonl(100))
    await runner(store, followed, api).run(batch.id)
    assert (store.state(batch.id).completed, api.most_at_once) == (100, 10 + RESERVE_ROWS)


async def test_without_reports_they_are_as_many_as_ever(store: Store, followed: Batches, api: StandIn) -> None:
    api.held = {f"p{n}" for n in range(600)}
    batch = submit(store, jsonl(600))
    running = asyncio.create_task(runner(store, followed, api).run(batch.id))
    await until(lambda: len(api.asked) == FIXED_ROWS)
    await asyncio.sleep(0.1)
    assert len(api.asked) == FIXED_ROWS
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


@contextlib.asynccontextmanager
async def both(store: Store, settings: Batches, api: StandIn, **windows_s: int) -> AsyncIterator[dict[str, Batch]]:
    """Two batches at work in an engine of 8 slots, each by the name of its user."""
    reported(api, 8, 8)
    api.delay_s = 0.02
    batches = {user: submit(store, jsonl(1000, user=user), window_s=s) for user, s in windows_s.items()}
    one = runner(store, settings, api)
    running = [asyncio.create_task(one.run(batch.id)) for batch in batches.values()]
    # What is counted begins when both are at work: one may have been validated long before the other.
    await until(lambda: all(api.by_user[user] for user in batches))
    yield batches
    for each in running:
        each.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_batches_share_what_the_engines_have_room_for(store: Store, followed: Batches, api: StandIn) -> None:
    async with both(store, followed, api, first=3600, second=3600):
        before = api.by_user.copy()
        await until(lambda: api.answered >= before.total() + 200)
        done = api.by_user - before
        assert abs(done["first"] - done["second"]) < 40, done


async def test_a_batch_that_would_miss_its_window_goes_first(
    store: Store, followed: Batches, api: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late until its last lines, whatever the pace of this machine; the other one has all the time in the world."""
    monkeypatch.setattr("hycluster.batch_api.lateness.LEAST_S", 0.1)
    monkeypatch.setattr("hycluster.batch_api.lateness.MARGIN", 1e5)
    async with both(store, followed, api, calm=10**9, hurried=3600) as batches:
        await until(lambda: (demand := api.lanes.demands.get(batches["hurried"].id)) and demand.urgent_at)
        before = api.by_user.copy()
        await until(lambda: api.by_user["hurried"] >= before["hurried"] + 200)
        # What it has in the engines already, and the one place that every batch keeps.
        assert (api.by_user - before)["calm"] < 200 / 3, api.by_user - before


async def test_a_batch_that_the_engines_have_no_time_for_says_so(store: Store, settings: Batches, api: StandIn) -> None:
    api.held = {"p1"}
    batch = submit(store, jsonl(4))
    running = asyncio.create_task(runner(store, settings, api).run(batch.id))
    await until(lambda: api.asked["p1"])
    api.lanes.starved = True
    await until(lambda: store.state(batch.id).waiting)
    told = batch_object(batch, store.state(batch.id), None)
    assert (told["status"], told["waiting"]) == ("in_progress", "online traffic")
    api.lanes.starved = False
    await until(lambda: not store.state(batch.id).waiting)
    assert "waiting" not in batch_object(batch, store.state(batch.id), None)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_cancel_needs_no_engine(store: Store, settings: Batches, api: StandIn) -> None:
    async def never() -> BatchEngines:
        await asyncio.sleep(3600)
        return await api.connect()

    batch = submit(store, jsonl(10))
    waiting = Runner(store, settings, never)
    running = asyncio.create_task(waiting.run(batch.id))
    await until(lambda: store.state(batch.id).status == "in_progress")
    store.cancel(batch.id)
    await running
    state = store.state(batch.id)
    assert (state.status, state.output_file_id, state.completed) == ("cancelled", None, 0)
    assert len(lines_of(store, state.error_file_id)) == 10


async def test_the_window_ends(store: Store, settings: Batches, api: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    api.held = {"p7"}
    batch = submit(store, jsonl(8))
    looks = 0

    def clock() -> float:
        """Past the window at the tenth look after all that can be answered was, however slow the machine is."""
        nonlocal looks
        looks += api.answered == 7
        return time.time() + (7200 if looks >= 10 else 0)

    monkeypatch.setattr(runner_module, "time", SimpleNamespace(time=clock))
    await runner(store, settings, api).run(batch.id)
    state = store.state(batch.id)
    assert (state.status, state.completed, state.failed) == ("expired", 7, 0)
    (left,) = lines_of(store, state.error_file_id)
    assert (left["custom_id"], left["response"], left["error"]["code"]) == ("c7", None, "batch_expired")


async def test_a_window_that_ended_while_nobody_was_there(store: Store, settings: Batches, api: StandIn) -> None:
    batch = submit(store, jsonl(8), window_s=-1)
    await runner(store, settings, api).run(batch.id)
    assert store.state(batch.id).status == "expired"
    assert not api.asked


async def test_counts_grow_while_it_runs(store: Store, settings: Batches, api: StandIn) -> None:
    api.held, api.statuses = {"p39"}, {"p3": [400]}
    batch = submit(store, jsonl(40))
    running = asyncio.create_task(runner(store, settings, api).run(batch.id))
    await until(lambda: (state := store.state(batch.id)).completed > 0 and state.failed == 1)
    state = store.state(batch.id)
    assert (state.status, state.total) == ("in_progress", 40)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_the_next_run_asks_only_what_is_not_committed(store: Store, settings: Batches, api: StandIn) -> None:
    api.held = {"p30"}
    batch = submit(store, jsonl(60))
    running = asyncio.create_task(runner(store, settings, api).run(batch.id))
    output = OutputFolder(store.work(batch.id).below("output"))
    await until(lambda: output.folder.exists("_job.json") and len(OutputFolder(output.folder).done()) >= 5)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    done = OutputFolder(output.folder).done()
    before, api.asked, api.held = dict(api.asked), type(api.asked)(), set()
    # Settings may have changed while nobody was there.
    await runner(store, settings.model_copy(update={"shard_lines": 9}), api).run(batch.id)
    state = store.state(batch.id)
    assert (state.status, state.completed) == ("completed", 60)
    assert ids(lines_of(store, state.output_file_id)) == [f"c{n}" for n in range(60)]
    committed = {f"p{4 * shard + row}" for shard in done for row in range(4)}
    assert committed <= set(before)
    assert not committed & set(api.asked)


STOPS = ["_validate", "_write_files", "close_batch", "save_state"]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("after", [False, True])
async def test_cut_off_at_any_stop(
    store: Store, settings: Batches, api: StandIn, monkeypatch: pytest.MonkeyPatch, stop: str, after: bool
) -> None:
    """The first three times that a step is reached the run dies before or after it; the next one goes on."""
    api.statuses = {"p3": [400]}
    batch = submit(store, jsonl(20))
    owner: Any = Runner if stop.startswith("_") else Store
    real = getattr(owner, stop)
    reached = 0

    def broken(*arguments: Any) -> Any:
        nonlocal reached
        reached += 1
        if reached > 3:
            return real(*arguments)
        if after:
            real(*arguments)
        raise OSError("the process died here")

    monkeypatch.setattr(owner, stop, broken)
    runs = 0
    while store.open_batches():
        runs += 1
        with contextlib.suppress(OSError):
            await runner(store, settings, api).run(batch.id)
        assert runs < 10
    assert reached
    state = store.state(batch.id)
    assert (state.status, state.completed, state.failed) == ("completed", 19, 1)
    assert ids(lines_of(store, state.output_file_id)) == [f"c{n}" for n in range(20) if n != 3]
    assert ids(lines_of(store, state.error_file_id)) == ["c3"]
    # Two files of results and one of input, whatever was tried.
    assert len(store.list_files(None, 100, purpose=None, newest_first=True)) == 3


async def test_a_part_that_was_changed_is_not_handed_out(
    store: Store, settings: Batches, api: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = submit(store, jsonl(8))
    real = Runner._write_files

    def tampered(self: Runner, *arguments: Any) -> State:
        part = next(Path(store.work(batch.id).root, "output").glob("part-*"))
        part.write_bytes(part.read_bytes()[:-1] + b"?")
        return real(self, *arguments)

    monkeypatch.setattr(Runner, "_write_files", tampered)
    with pytest.raises(JobFailed, match="not those that were written"):
        await runner(store, settings, api).run(batch.id)
    assert store.state(batch.id).status == "finalizing"


async def test_one_process_a_batch(store: Store, settings: Batches, api: StandIn) -> None:
    batch = submit(store, jsonl(8))
    with Lease(store.work(batch.id).below("output")) as other:
        other.take()
        with pytest.raises(JobFailed, match="is being written by"):
            await runner(store, settings, api).run(batch.id)
    assert not api.asked
    await runner(store, settings, api).run(batch.id)
    assert store.state(batch.id).status == "completed"


async def test_on_an_object_store(settings: Batches, api: StandIn, objects: ObjectStore) -> None:
    api.held, api.statuses = {"p9"}, {"p3": [400]}
    settings = settings.model_copy(update={"store": objects.uri("batches")})
    store = Store(settings)
    batch = submit(store, jsonl(12))
    running = asyncio.create_task(runner(store, settings, api).run(batch.id))
    await until(lambda: api.asked["p9"] and store.state(batch.id).completed >= 7)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    api.held = set()
    await runner(store, settings, api).run(batch.id)
    state = store.state(batch.id)
    assert (state.status, state.completed, state.failed) == ("completed", 11, 1)
    assert ids(lines_of(store, state.output_file_id)) == [f"c{n}" for n in range(12) if n != 3]
    assert store.open_batches() == []
    store.sweep()
    listed = store.list_files(None, 10, purpose="batch_output", newest_first=True)
    assert {file.id for file in listed} == {state.output_file_id, state.error_file_id}
    store.delete_file(batch.input_file_id)
    with pytest.raises(NotFound):
        store.open_content(batch.input_file_id)


class TestWatch:
    async def watched(self, store: Store, settings: Batches, api: StandIn, at_once: int = 2) -> asyncio.Task[None]:
        watch = StoreWatch(store, runner(store, settings, api), at_once, settings.poll_s)
        return asyncio.create_task(watch.run())

    async def end(self, watching: asyncio.Task[None]) -> None:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching

    async def test_it_finds_batches_and_runs_several_at_once(
        self, store: Store, settings: Batches, api: StandIn
    ) -> None:
        api.held = {"p1"}
        slow = submit(store, jsonl(4))
        watching = await self.watched(store, settings, api)
        await until(lambda: api.asked["p1"])
        quick = [submit(store, line(f"q{n}")) for n in range(3)]
        await until(lambda: store.open_batches() == [slow.id])
        assert all(store.state(batch.id).status == "completed" for batch in quick)
        await self.end(watching)

    async def test_projects_take_turns(self) -> None:
        """Whoever has many batches does not keep others' from beginning."""
        owners = {f"batch_{n}": "greedy" for n in range(6)} | {"batch_7": "modest", "batch_8": "modest"}
        left, begun, may_end = sorted(owners), list[str](), asyncio.Semaphore(0)

        def batch(batch_id: str) -> Any:
            return SimpleNamespace(caller=Caller("acme", owners[batch_id], "k").as_json())

        async def run(batch_id: str) -> None:
            begun.append(owners[batch_id])
            await may_end.acquire()
            left.remove(batch_id)

        store: Any = SimpleNamespace(open_batches=lambda: [*left], batch=batch, sweep=lambda: None)
        watch = StoreWatch(store, SimpleNamespace(run=run), 2, 0.01)  # type: ignore[arg-type]
        watching = asyncio.create_task(watch.run())
        for number in range(2, 9):
            await until(lambda number=number: len(begun) == number)  # type: ignore[misc]
            may_end.release()
        await self.end(watching)
        assert begun == ["greedy", "modest", "greedy", "modest", *["greedy"] * 4]

    async def test_a_batch_that_fails_is_tried_again_and_ends_after_its_window(
        self, store: Store, settings: Batches, api: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("hycluster.batch_api.executor.FIRST_PAUSE_S", 0.01)
        monkeypatch.setattr("hycluster.batch_api.executor.GRACE_S", 3.0)
        tries = 0

        def broken(self: Runner, batch: Batch) -> State:
            nonlocal tries
            tries += 1
            raise OSError("no space")

        monkeypatch.setattr(runner_module.Runner, "_validate", broken)
        batch = submit(store, jsonl(4), window_s=0)
        watching = await self.watched(store, settings, api)
        await until(lambda: not store.open_batches())
        state = store.state(batch.id)
        assert state.status == "failed"
        assert [(error.code, error.message) for error in state.errors] == [("internal_error", "OSError: no space")]
        assert tries > 1
        await self.end(watching)


def test_output_lines_are_ascii_and_one_a_line(store: Store, settings: Batches, api: StandIn) -> None:
    batch = submit(store, jsonl(3))
    asyncio.run(runner(store, settings, api).run(batch.id))
    content = b"".join(store.chunks(store.open_content(store.state(batch.id).output_file_id or "")))
    text = content.decode("ascii")
    assert [json.loads(each)["custom_id"] for each in text.splitlines()] == ["c0", "c1", "c2"]


async def test_answered_lines_are_in_the_ledger_once_whoever_is_killed(
    store: Store, settings: Batches, api: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = Books(store.folder.below("ledger"))
    ledger = LedgerLines(books, lambda model, *tokens: Decimal(sum(tokens)) if model == "m" else Decimal(0))
    api.statuses["p3"] = [400]
    caller = Caller("acme", "search", "ci", key_id="key_1").as_json()
    batch = submit(store, jsonl(10), caller=caller)
    # Between a shard's commit and its entry, and then between the entries and the end.
    for holder, step in ((LedgerLines, "enter"), (LedgerLines, "_entries"), (Runner, "_write_files")):
        with monkeypatch.context() as patched:
            patched.setattr(holder, step, _killed)
            with pytest.raises(JobFailed):
                await Runner(store, settings, api.connect, ledger=ledger).run(batch.id)
    asked = api.answered
    await Runner(store, settings, api.connect, ledger=ledger).run(batch.id)
    assert api.answered == asked
    usage = store.state(batch.id).usage
    assert usage is not None
    (found,) = sum_usage(books, ["tenant", "project", "key", "model", "tier", "outcome"])
    assert found.group == {
        "tenant": "acme", "project": "search", "key": "key_1", "key_name": "ci", "model": "m", "tier": "batch",
        "outcome": "finished",
    }  # fmt: skip
    assert found.requests == 9
    assert found.cost == Decimal(9 * (3 + 1 + 2))
    told = found.input_tokens, found.cached_tokens, found.output_tokens
    assert told == (usage.input_tokens, usage.cached_tokens, usage.output_tokens) == (27, 9, 18)
    answered = {line["response"]["request_id"] for line in lines_of(store, store.state(batch.id).output_file_id)}
    table = pa.concat_tables(books.tables())
    assert set(table.column("request_id").to_pylist()) == answered


async def test_a_line_costs_as_the_model_that_answered_it_whatever_it_calls_that(
    store: Store, settings: Batches, api: StandIn
) -> None:
    books = Books(store.folder.below("ledger"))
    ledger = LedgerLines(books, lambda model, *tokens: Decimal(sum(tokens)) if model == "m" else Decimal(0))
    # Of an adapter that was loaded at run time no settings know.
    bodies = {"c0": {"model": "tuned", "prompt": "p0"}, "c1": {"prompt": "p1"}}
    batch = submit(store, "".join(line(named, body=body) + "\n" for named, body in bodies.items()))
    await Runner(store, settings, api.connect, ledger=ledger).run(batch.id)
    found = {group.group["model"]: group.cost for group in sum_usage(books, ["model"])}
    assert found == {"tuned": Decimal(3 + 1 + 2), "m": Decimal(3 + 1 + 2)}


def _killed(*_: object) -> None:
    raise JobFailed("killed")
