from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hycluster.errors import SettingsError
from hycluster.serving import running
from hycluster.serving.running import choose, forget, remember, remember_service, started_here

MINE = "127.0.0.1:1234"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "state" / "clusters"


@pytest.fixture
def other() -> Iterator[int]:
    """A process that lives."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def known(pid: int, address: str, folder: Path, **changed: Any) -> Path:
    """A file as a process of this machine leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"address": address, "pid": pid, "begun": running._begun(pid), "host": socket.gethostname(), "since": 1.0}
    file = folder / f"{pid}.json"
    file.write_text(json.dumps({**state, "models": ["m"], **changed}))
    return file


def test_the_only_one_is_taken_and_named() -> None:
    remember(MINE)
    remember_service(["a", "b"], "sqlite:////x/keys.db")
    chosen = choose()
    assert (chosen.address, chosen.said_by) == (MINE, "this HYCLUSTER_HOME")
    assert str(chosen).startswith(f"{MINE} (started by process {os.getpid()} of this machine at 20")
    assert str(chosen).endswith(" for a, b)")
    forget()
    assert started_here() == []


def test_without_one_nothing_is_taken(tmp_path: Path) -> None:
    remember_service(["a"], None)
    with pytest.raises(SettingsError, match=rf"^--address: .* \({tmp_path}\); give --address HOST:PORT or RAY_ADDRESS"):
        choose()


def test_of_several_one_must_be_named(folder: Path, other: int) -> None:
    remember(MINE)
    known(other, "127.0.0.1:99", folder)
    with pytest.raises(
        SettingsError, match=r"^--address: 2 running clusters .*\n  127.0.0.1:99 started .* for m\n  127.0.0.1:1"
    ):
        choose()
    assert choose(MINE).started == next(one for one in started_here() if one.pid == os.getpid())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="here a number is all that is known of a process")
@pytest.mark.parametrize("begun", ["", "another boot 17"])
def test_a_later_process_of_the_same_number_is_not_taken_for_it(folder: Path, other: int, begun: str) -> None:
    file = known(other, MINE, folder, begun=begun)
    with pytest.raises(SettingsError, match="no running one was started"):
        choose()
    assert not file.exists()


def test_one_whose_process_is_dead_is_forgotten(folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    file = known(process.pid, MINE, folder)
    assert [one.address for one in started_here()] == [MINE]
    process.communicate()
    assert started_here() == []
    assert not file.exists()


def test_what_another_machine_has_left_is_left_alone(folder: Path, other: int) -> None:
    file = known(other, MINE, folder, host="elsewhere")
    assert started_here() == []
    assert file.exists()


@pytest.mark.parametrize("content", ["", "nonsense", "{}", "[]", '{"address": "127.0.0.1:1", "pid": 1}'])
def test_a_broken_file_is_ignored(folder: Path, content: str) -> None:
    folder.mkdir(parents=True)
    (folder / "1.json").write_text(content)
    assert started_here() == []


def test_a_named_cluster_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    remember(MINE)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert str(choose()) == "10.0.0.1:6379 (named by RAY_ADDRESS)"
    assert str(choose("10.0.0.2:6379")) == "10.0.0.2:6379 (named by --address)"


@pytest.mark.parametrize("named", ["auto", "local"])
def test_what_ray_would_find_is_no_name(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    with pytest.raises(SettingsError, match=f"^--address: '{named}' is not allowed.*must be HOST:PORT"):
        choose(named)
    monkeypatch.setenv("RAY_ADDRESS", named)
    with pytest.raises(SettingsError, match=f"^RAY_ADDRESS: '{named}' is not allowed"):
        choose()


def test_a_home_that_cannot_be_written_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path / "file"))
    remember(MINE)
    assert "give them --address: [Errno 20] Not a directory" in caplog.text


def test_word_of_clusters_that_are_no_more_goes_when_another_starts(folder: Path, other: int) -> None:
    long_ago = time.time() - 2 * 86400
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        lives_elsewhere = known(1, address, folder, host="elsewhere")
        gone = [
            known(2**22 + 1, MINE, folder, begun="long ago"),
            known(2, "127.0.0.1:1", folder, host="elsewhere"),
            folder / "3.tmp",
        ]
        new_elsewhere = known(4, "127.0.0.1:1", folder, host="elsewhere")
        gone[-1].touch()
        for file in (lives_elsewhere, *gone):
            os.utime(file, (long_ago, long_ago))
        mine = known(other, MINE, folder)
        remember("127.0.0.1:9")
    assert not any(file.exists() for file in gone)
    assert lives_elsewhere.exists()
    assert new_elsewhere.exists()
    assert mine.exists()
    assert len(started_here()) == 2


def test_machines_with_the_same_numbers_do_not_overwrite_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(MINE)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    remember("127.0.0.1:9")
    assert len(list(folder.glob("*.json"))) == 2
