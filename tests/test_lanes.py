from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from xdist.remote import Producer

from tests import lanes
from tests.waiting import PATIENCE_S


def test_every_file_in_the_tables_is_there() -> None:
    files = {f"integration/{name}" for names in lanes.SHARED.values() for name in names}
    files |= {*lanes.HEAVY, *lanes.FORKING, *lanes.LAST, *lanes.FORKS} - {*lanes.SHARED, "forks"}
    assert {name for name in files if not (lanes.ROOT / "tests" / f"{name}.py").is_file()} == set()


def test_what_shares_a_cluster_is_one_room() -> None:
    names = lanes.SHARED["served"][:2]
    assert {lanes.room_of(f"tests/integration/{name}.py::Some::test_it[a::b]") for name in names} == {"served"}
    assert {lanes.room_of(f"tests/{name}.py::test_it") for name in lanes.FORKS} == {"forks"}
    assert lanes.room_of("tests/gateway/test_router.py::test_it") == "gateway/test_router"


class Item:
    nodeid = "tests/test_new.py::test_it"
    fixturenames = ("served",)


def test_a_second_worker_does_not_start_the_cluster_unseen() -> None:
    with pytest.raises(pytest.UsageError, match=r"tests/test_new\.py::test_it uses 'served'"):
        lanes.check_shared([Item()])  # type: ignore[list-item]


@pytest.mark.parametrize("lane", lanes.Lane)
def test_each_lane_takes_its_own_first_then_the_others_and_last_who_must_be_alone(lane: lanes.Lane) -> None:
    heavy, light = ["served", "integration/test_start"], ["gateway/test_pool", "gateway/test_router"]
    order = sorted([*lanes.LAST, *heavy, *light, *lanes.FORKING], key=lambda room: lanes._rank(room, lane))
    if lane is lanes.Lane.LIGHT:
        light.reverse()
    light = [*lanes.FORKING, *light]
    assert order == [*(heavy + light if lane is lanes.Lane.HEAVY else light + heavy), *lanes.LAST]


def test_who_has_which_lane() -> None:
    heavy, vllm, light = lanes.Lane
    assert [[lanes.lane_of(worker, workers) for worker in range(workers)] for workers in range(1, 5)] == [
        [heavy],
        [heavy, vllm],
        [heavy, vllm, light],
        [heavy, heavy, vllm, light],
    ]


class Worker:
    """Stands where xdist has a process."""

    def __init__(self, number: int) -> None:
        self.gateway = SimpleNamespace(id=f"gw{number}")
        self.has: list[str] = []
        self.shutting_down = False
        self.tests: list[str] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.has += [self.tests[index] for index in indices]

    def shutdown(self) -> None:
        self.shutting_down = True


def scheduled(workers: int, rooms: list[str]) -> tuple[lanes.Lanes, list[Worker]]:
    """Each room has four tests."""
    option = SimpleNamespace(tx=["popen"] * workers, dist="loadscope", loadscopereorder=False)
    config = SimpleNamespace(option=option, getvalue=lambda name: getattr(option, name))
    lane = lanes.Lanes(config, Producer("test", enabled=False))
    made = [Worker(number) for number in range(workers)]
    for worker in made:
        worker.tests = [f"tests/{room}.py::test_{number}" for room in rooms for number in range(4)]
        lane.add_node(worker)
        lane.add_node_collection(worker, worker.tests)
    lane.schedule()
    return lane, made


def done(lane: lanes.Lanes, worker: Worker) -> None:
    """It ends all that it has but for two tests, at which it asks for more."""
    rooms = {lanes.room_of(test) for test in worker.has}
    for test in worker.has[:-2]:
        if not lane.assigned_work[worker][lanes.room_of(test)][test]:
            lane.mark_test_complete(worker, worker.tests.index(test))
    assert len({lanes.room_of(test) for test in worker.has} - rooms) <= 1


def rooms_of(worker: Worker) -> list[str]:
    return list(dict.fromkeys(lanes.room_of(test) for test in worker.has))


def test_never_three_are_heavy_beside_each_other() -> None:
    heavy = ["integration/test_start", "integration/test_drain", "integration/test_submit", "integration/test_spread"]
    lane, (first, second, third) = scheduled(3, [*heavy, "test_top", "test_cli"])
    assert (rooms_of(first), rooms_of(second), rooms_of(third)) == (heavy[:1], ["test_top"], ["test_cli"])
    done(lane, third)
    assert rooms_of(third) == ["test_cli", "integration/test_spread"]
    done(lane, second)
    assert (rooms_of(second), second.shutting_down) == (["test_top"], True)
    done(lane, first)
    assert not first.shutting_down
    assert len(rooms_of(first)) == 2


def test_where_all_is_heavy_the_third_has_nothing_to_do() -> None:
    _, workers = scheduled(3, ["integration/test_start", "integration/test_drain", "integration/test_submit"])
    assert [len(rooms_of(worker)) for worker in workers] == [1, 1, 0]
    assert [worker.shutting_down for worker in workers] == [False, False, True]


def test_what_rooms_take_and_when_each_worker_ended_is_told() -> None:
    def report(file: str, worker: str, begun_s: float, took_s: float) -> pytest.TestReport:
        made = pytest.TestReport(
            f"tests/{file}.py::test_it", ("", 0, ""), {}, "passed", None, "call",
            duration=took_s, start=begun_s, stop=begun_s + took_s,
        )  # fmt: skip
        made.worker_id = worker  # type: ignore[attr-defined]
        return made

    reports = [
        report("integration/test_health", "gw0", 100, 20),
        report("integration/test_chaos", "gw0", 120, 30),
        report("test_cli", "gw1", 100, 5),
        report("test_top", "gw1", 105, 6),
    ]
    assert list(lanes.spent(reports, 90)) == [
        "rooms: served 50 s, light 11 s",
        "of the light ones: test_top 6 s, test_cli 5 s",
        "gw0 ended its last test after 60 s",
        "gw1 ended its last test after 21 s",
    ]


@pytest.fixture
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.usefixtures("_own_places")
def test_who_is_alone_waits_for_the_others_and_they_for_it() -> None:
    said: list[str] = []
    there, goes = threading.Event(), threading.Event()

    def alone() -> None:
        with lanes.place(alone=True):
            said.append("alone")
            there.set()
            goes.wait(PATIENCE_S)
            said.append("alone no more")

    def beside() -> None:
        with lanes.place(alone=False):
            said.append("beside")

    first, second = threading.Thread(target=alone), threading.Thread(target=beside)
    with lanes.place(alone=False), lanes.place(alone=False):
        first.start()
        first.join(0.3)
        assert said == []
    assert there.wait(PATIENCE_S)
    second.start()
    second.join(0.3)
    goes.set()
    first.join(PATIENCE_S)
    second.join(PATIENCE_S)
    assert said == ["alone", "alone no more", "beside"]
