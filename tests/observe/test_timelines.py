from __future__ import annotations

import asyncio
import contextlib

import pytest

from hycluster.errors import DeadlineExceeded, InvalidInput, Unavailable
from hycluster.observe import timelines
from hycluster.observe.catalogue import INGRESS
from hycluster.observe.timelines import KEPT_SLOWEST, Carried, Question, Recorder
from hycluster.timeline import Timeline, current
from hycluster.trace_context import TraceContext


def carried_out(
    recorder: Recorder, name: str, took_s: float = 0.1, model: str = "tiny", *, bulk: bool = False
) -> Timeline:
    timeline = recorder.begin(name, "generate", model=model, process="ingress")
    timeline.began_s -= took_s
    timeline.begin_track(name, model, 1, bulk=bulk).end("stop")
    recorder.end(timeline)
    return timeline


def names(listed: list[dict[str, object]]) -> list[object]:
    return [each["id"] for each in listed]


def test_the_last_ones_are_kept_and_the_slowest_whatever_came_after() -> None:
    recorder = Recorder(kept=10)
    carried_out(recorder, "slow", took_s=50.0)
    for number in range(2000):
        carried_out(recorder, f"quick-{number}", took_s=1.0 + number / 100)
    assert recorder.find("slow") is not None
    assert recorder.find("quick-1999") is not None
    assert recorder.find("quick-5") is None
    assert len(list(recorder._known())) <= 10 + KEPT_SLOWEST
    assert names(recorder.slowest(2)) == ["slow", "quick-1999"]


@pytest.mark.parametrize(
    ("reasons", "status"),
    [(["stop"], "ok"), (["length", "abort"], "ok"), (["stop", "ReplicaLost"], "failed"), (["error"], "failed")],
)
def test_an_answer_that_breaks_in_its_midst_has_failed(reasons: list[str], status: str) -> None:
    """Also where the ingress has said 200 long before, and told the rest in its stream."""
    recorder = Recorder()
    with contextlib.ExitStack() as stack:
        stack.callback(current.set, None)
        timeline = recorder.begin("r", "POST /v1/completions", process="ingress")
        for reason in reasons:
            timeline.begin_track("r", "tiny", 1).end(reason)
        recorder.end(timeline)
    assert timeline.status == status
    assert timeline.error == (reasons[-1] if status == "failed" else "")


def test_whose_deadline_has_passed_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timelines, "recorder", Recorder())
    with contextlib.suppress(DeadlineExceeded), Carried("r", "grpc Generate") as timeline:
        raise DeadlineExceeded("over")
    assert (timeline.status, timeline.error) == ("cancelled", "DeadlineExceeded")


def test_rows_of_batch_work_push_out_nobody_and_have_a_list_of_their_own() -> None:
    recorder = Recorder(kept=10)
    carried_out(recorder, "online")
    for number in range(2000):
        carried_out(recorder, f"row-{number}", took_s=50.0 + number, bulk=True)
    assert recorder.find("online") is not None
    assert recorder.find("row-1999") is not None
    assert names(recorder.slowest(5)) == ["online"]
    assert names(recorder.slowest(1, bulk=True)) == ["row-1999"]
    said = recorder.slowest(1, bulk=True) + recorder.slowest(1)
    assert [each["priority"] for each in said] == ["batch", "online"]
    # A job's rows are, wherever they are carried out.
    row = recorder.begin("own", "row", process="batch")
    row.begin_track("own", "tiny", 1)
    recorder.end(row)
    assert len(recorder.slowest(99, bulk=False)) == 1
    assert names(recorder.answer(Question("1", slowest=1, bulk=True)) or []) == ["row-1999"]


def test_slow_ones_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(kept=1)
    carried_out(recorder, "slow", took_s=50.0)
    monkeypatch.setattr(timelines, "SLOWEST_FOR_S", -1.0)
    for number in range(2 * KEPT_SLOWEST + 1):
        carried_out(recorder, f"quick-{number}", took_s=1.0)
    assert recorder.find("slow") is None


def test_a_list_is_of_one_model_if_asked() -> None:
    recorder = Recorder()
    carried_out(recorder, "a", 3.0)
    carried_out(recorder, "b", 2.0, model="other")
    carried_out(recorder, "c", 1.0)
    assert names(recorder.slowest(10, "tiny")) == ["a", "c"]
    assert names(recorder.slowest(1)) == ["a"]


def test_what_came_to_no_engine_pushes_nothing_out() -> None:
    recorder = Recorder(kept=2)
    carried_out(recorder, "answered")
    for number in range(100):
        recorder.end(recorder.begin(f"refused-{number}", "row"), "failed", "Overloaded: too many")
    assert recorder.find("answered") is not None
    assert recorder.find("refused-99") is None


def test_one_that_is_on_its_way_is_found() -> None:
    recorder = Recorder()
    timeline = recorder.begin("running", "generate", process="ingress")
    track = timeline.begin_track("running", "tiny", 1)
    tokens = iter([3, 4])
    track.tokens_so_far = lambda: next(tokens)
    found = recorder.find("running")
    assert found is not None
    assert (found["status"], found["output_tokens"], found["instance"]) == ("running", 3, INGRESS)
    track.end("stop")
    assert track.tokens_so_far is None
    assert [timeline.output_tokens, timeline.output_tokens] == [4, 4]
    assert names(recorder.slowest(5)) == ["running"]
    recorder.end(timeline)
    assert not recorder._running


def test_a_name_that_is_said_in_full_goes_before_one_that_ends_like_it() -> None:
    recorder = Recorder()
    wanted = carried_out(recorder, "file#3")
    carried_out(recorder, "job-file#3")
    found = recorder.find("file#3")
    assert found is not None
    assert found["id"] == wanted.id


def test_a_process_answers_a_question_once() -> None:
    recorder = Recorder()
    carried_out(recorder, "a")
    one = recorder.answer(Question("1", "a"))
    assert one is not None
    assert names(one) == ["a"]
    assert recorder.answer(Question("1", "a")) is None
    assert recorder.answer(Question("2", "b")) == []
    assert names(recorder.answer(Question("3")) or []) == ["a"]


def test_who_wants_to_know_can_spoil_nothing(caplog: pytest.LogCaptureFixture) -> None:
    recorder, heard = Recorder(), list[Timeline]()

    def breaks(_: Timeline) -> None:
        raise ValueError("broken")

    recorder.ended += [breaks, heard.append]
    timeline = carried_out(recorder, "a")
    assert heard == [timeline]
    assert "could not be told of" in caplog.text


def test_it_is_decided_at_the_beginning_what_is_sampled() -> None:
    recorder = Recorder()
    recorder.samples = lambda _, parent: parent is not None
    assert not recorder.begin("a", "row").sampled
    assert recorder.begin("b", "row", TraceContext(1, 2, True)).sampled


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(timelines, "recorder", recorder)
    return recorder


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, "ok", ""),
        (Unavailable("no replica"), "failed", "Unavailable: no replica"),
        # One word for it, whichever library's form it has as well.
        (type("PoolUnavailable", (Unavailable,), {})("no replica"), "failed", "Unavailable: no replica"),
        (type("PoolInvalidInput", (InvalidInput,), {})("prompt: is wrong"), "failed", "InvalidInput"),
        # What these say may be the caller's own words.
        (InvalidInput("prompt: is wrong"), "failed", "InvalidInput"),
        (ValueError("wrong"), "failed", "ValueError"),
        (asyncio.CancelledError(), "cancelled", ""),
        (GeneratorExit(), "cancelled", ""),
    ],
)
def test_how_a_request_ended(own: Recorder, error: BaseException | None, status: str, said: str) -> None:
    ended: list[Timeline] = []
    own.ended.append(ended.append)
    with pytest.raises(type(error)) if error is not None else contextlib.nullcontext():  # noqa: SIM117
        with Carried("a", "row") as timeline:
            assert current.get() is timeline
            if error is not None:
                raise error
    assert current.get() is None
    assert [(one.status, one.error) for one in ended] == [(status, said)]


def test_what_is_carried_out_within_a_request_is_a_part_of_it(own: Recorder) -> None:
    with Carried("outer", "row") as outer, Carried("inner", "generate") as inner:
        assert inner is outer
    assert outer.status == "ok"


async def test_a_task_that_outlives_its_request_has_a_timeline_of_its_own(own: Recorder) -> None:
    let = asyncio.Event()

    async def later() -> Timeline:
        await let.wait()
        with Carried("later", "row") as timeline:
            return timeline

    with Carried("outer", "row") as outer:
        task = asyncio.create_task(later())
    let.set()
    assert (await task) is not outer
    assert (await task).id == "later"
