from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("light", [False, True])
def test_each_lane_takes_its_own_first_then_the_others_and_last_who_must_be_alone(light: bool) -> None:
    rooms = [*lanes.LAST, "served", "integration/test_start", "gateway/test_router", *lanes.FORKING]
    order = sorted(rooms, key=lambda room: lanes._rank(room, light))
    heavy, others = ["served", "integration/test_start"], [*lanes.FORKING, "gateway/test_router"]
    assert order == [*(others + heavy if light else heavy + others), *lanes.LAST]


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
