import re
import stat
from pathlib import Path

import demo_process
import pytest
from demo_process import DemoFailed, Process


def ignore(detail: str) -> None:
    pass


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell script that stands in for ``hycluster``: its arguments are the program it runs."""
    path = tmp_path / "hycluster"
    path.write_text('#!/bin/sh\neval "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(demo_process, "HYCLUSTER", str(path))
    return path


def test_a_process_is_waited_for_by_its_lines(command: Path, tmp_path: Path) -> None:
    process = Process(["echo one; echo ready two; exec sleep 60"], tmp_path / "log")
    seen: list[str] = []
    try:
        assert process.wait_for(lambda line: line.startswith("ready"), 30, seen.append) == "ready two"
        assert seen == ["one"]
        assert process.running()
    finally:
        process.stop()
    assert not process.running()
    assert (tmp_path / "log").read_text() == "one\nready two\n"


def test_a_process_that_ends_well_has_no_line_to_wait_for(command: Path, tmp_path: Path) -> None:
    process = Process(["echo one"], tmp_path / "log")
    assert process.wait_for(lambda line: line == "two", 30, ignore) is None
    assert process.stop()


def test_a_process_that_fails_is_told_with_its_last_words(command: Path, tmp_path: Path) -> None:
    process = Process(["echo port 8000 is in use; exit 3"], tmp_path / "log")
    with pytest.raises(DemoFailed, match=re.compile("exit code 3; its log is .*log.*port 8000 is in use", re.DOTALL)):
        process.wait(30, ignore)


def test_a_process_that_takes_too_long_fails_the_demo(command: Path, tmp_path: Path) -> None:
    process = Process(["exec sleep 60"], tmp_path / "log")
    try:
        with pytest.raises(DemoFailed, match="not done after 0 s"):
            process.wait(0.3, ignore)
    finally:
        process.stop()


def test_a_process_that_does_not_listen_is_killed(
    command: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_process, "STOP_TIMEOUT_S", 0.3)
    process = Process(["trap '' TERM; echo up; while true; do sleep 0.1; done"], tmp_path / "log")
    process.wait_for(lambda line: line == "up", 30, ignore)
    assert not process.stop()
    assert not process.running()
