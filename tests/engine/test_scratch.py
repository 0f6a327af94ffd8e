"""Folders of engines' temporary files, and who removes them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hycluster.engine import scratch
from hycluster.engine.scratch import MOST_CHARACTERS, Scratch, folders, sweep
from hycluster.errors import EngineStartFailed

ENGINE = """
import sys, time
from hycluster.engine.scratch import Scratch
mine = Scratch()
(mine.path / "socket").touch()
print(mine.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary folder of this test's own, with a short name."""
    # pytest makes its own one when it is first asked, for all tests that follow.
    tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", "")
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
        scratch._machines.cache_clear()
        yield Path(folder)
    scratch._machines.cache_clear()


def other_engine() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", ENGINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_an_engine_has_a_folder_until_it_ends(machine: Path) -> None:
    mine = Scratch()
    assert mine.path.parent == folders()
    assert mine.path.stat().st_mode & 0o777 == folders().stat().st_mode & 0o777 == 0o700
    assert tempfile.gettempdir() == os.environ["VLLM_RPC_BASE_PATH"] == str(mine.path)
    (mine.path / "vllm_dist_1").touch()
    sweep()
    assert mine.path.exists(), "it is in use"
    mine.remove()
    assert not mine.path.exists()
    assert tempfile.gettempdir() == str(machine)
    assert "VLLM_RPC_BASE_PATH" not in os.environ


def test_what_a_killed_engine_leaves_goes_with_the_next_start() -> None:
    killed, orphan = other_engine()
    living, used = other_engine()
    with killed, living:
        killed.kill()
        killed.wait()
        assert (orphan / "socket").exists()
        mine = Scratch()
        assert not orphan.exists()
        assert (used / "socket").exists()
        mine.remove()
        living.kill()
    sweep()
    assert not list(folders().iterdir())


def test_sweeping_where_no_engine_was() -> None:
    sweep()
    assert not folders().exists()


def test_a_path_that_sockets_can_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 20)))
    scratch._machines.cache_clear()
    assert folders().parent == Path("/tmp")
    assert len(str(folders() / "engine-12345678")) < MOST_CHARACTERS


def test_a_folder_of_somebody_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folders().mkdir()
    uid = os.getuid()
    where = folders()
    monkeypatch.setattr(scratch, "folders", lambda: where)
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(EngineStartFailed, match="belongs to another user"):
        Scratch()
