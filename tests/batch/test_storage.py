from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from hycluster.batch.storage import create_if_absent, exists, locate, read_json


def test_the_first_of_many_writers_wins(tmp_path: Path) -> None:
    target = str(tmp_path / "record.json")
    with ThreadPoolExecutor(8) as writers:
        won = list(
            writers.map(lambda n: create_if_absent(pafs.LocalFileSystem(), target, b'{"by": %d}' % n), range(32))
        )
    assert won.count(True) == 1
    assert read_json(pafs.LocalFileSystem(), target) == {"by": won.index(True)}
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_other_filesystems_keep_what_is_there(tmp_path: Path) -> None:
    filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    assert create_if_absent(filesystem, "x", b"1")
    assert not create_if_absent(filesystem, "x", b"2")
    assert (tmp_path / "x").read_bytes() == b"1"
    assert exists(filesystem, "x")
    assert not exists(filesystem, "y")


def test_local_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("a/b", "input.path")[1] == str(tmp_path / "a" / "b")
    assert locate(f"file://{tmp_path}/a/", "input.path")[1] == str(tmp_path / "a")
