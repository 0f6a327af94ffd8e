from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pyarrow.fs as pafs
import pytest

from hycluster.errors import SettingsError
from hycluster.storage import (
    check_creates_once,
    create_if_absent,
    delete,
    exists,
    locate,
    make_folder,
    names,
    read_json,
    read_whole,
    replace,
    shown,
    write,
)
from tests.object_store import BUCKET, ObjectStore


def test_the_first_of_many_writers_wins(tmp_path: Path) -> None:
    target = str(tmp_path / "record.json")
    with ThreadPoolExecutor(8) as writers:
        won = list(
            writers.map(lambda n: create_if_absent(pafs.LocalFileSystem(), target, b'{"by": %d}' % n), range(32))
        )
    assert won.count(True) == 1
    assert read_json(pafs.LocalFileSystem(), target) == {"by": won.index(True)}
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_other_filesystems_are_refused(tmp_path: Path) -> None:
    filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    with pytest.raises(SettingsError, match=r"^output.path: 'x' is on 'subtree'.* must be a local path or an s3://"):
        create_if_absent(filesystem, "x", b"1")
    assert not list(tmp_path.iterdir())


def test_one_of_two_writers_wins_in_an_object_store(store: ObjectStore) -> None:
    filesystem, root = locate(store.uri("rounds"), "output.path")
    with ThreadPoolExecutor(2) as writers:
        for turn in range(60):
            path = f"{root}/{turn}.json"
            together = Barrier(2)

            def attempt(writer: int, path: str = path, together: Barrier = together) -> bool:
                together.wait()
                return create_if_absent(filesystem, path, b'{"by": %d}' % writer)

            won = list(writers.map(attempt, range(2)))
            assert won.count(True) == 1
            assert read_json(filesystem, path) == {"by": won.index(True)}
    assert store.conditional_writes >= 120


def test_an_object_store_is_found_by_the_environment_too(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{store.address}")
    filesystem, path = locate(f"s3://{BUCKET}/environment", "output.path")
    assert create_if_absent(filesystem, path, b"1")
    assert not create_if_absent(filesystem, path, b"2")
    delete(filesystem, [path, path])
    assert not exists(filesystem, path)


def test_what_an_object_store_refuses_is_one_line(store: ObjectStore) -> None:
    filesystem, path = locate(store.uri("x").replace(BUCKET, "no-such-bucket"), "output.path")
    with pytest.raises(OSError, match="NoSuchBucket") as caught:
        create_if_absent(filesystem, path, b"")
    assert "Debug source" not in str(caught.value)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    replace(pafs.LocalFileSystem(), str(target), b"1")
    replace(pafs.LocalFileSystem(), str(target), b"2")
    assert list(names(pafs.LocalFileSystem(), str(tmp_path))) == ["x.json"]
    assert target.read_bytes() == b"2"
    assert list(names(pafs.LocalFileSystem(), str(tmp_path / "none"))) == []


@pytest.mark.parametrize("where", ["disk", "object store"])
def test_a_file_that_is_being_replaced_is_read_whole(tmp_path: Path, store: ObjectStore, where: str) -> None:
    filesystem, folder = locate(str(tmp_path) if where == "disk" else store.uri("replaced"), "p")
    path = f"{folder}/f"
    assert read_whole(filesystem, path) is None
    contents = [b"a" * 10, b"b" * 5000]
    replace(filesystem, path, contents[0])

    def rewrite() -> None:
        for n in range(60):
            replace(filesystem, path, contents[n % 2])

    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(rewrite)
        read = {read_whole(filesystem, path) for _ in range(40)}
        writing.result()
    assert read <= set(contents)
    assert read_whole(filesystem, path) == contents[1]


def test_local_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("a/b", "input.path")[1] == str(tmp_path / "a" / "b")
    assert locate(f"file://{tmp_path}/a/", "input.path")[1] == str(tmp_path / "a")


def test_a_store_that_ignores_the_condition_is_refused(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem, root = locate(store.uri("probed"), "output.path")
    check_creates_once(filesystem, f"{root}/x.json")
    monkeypatch.setattr(store, "honours_conditions", False)
    with pytest.raises(SettingsError, match=r"^output.path: bucket 'corpus' is in a store that ignores 'If-None-Match"):
        check_creates_once(filesystem, f"{root}/x.json")
    assert list(names(filesystem, root)) == []


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("s3://KEY:SECRET@bucket/a/b@c?region=r", "s3://***@bucket/a/b@c?region=r"),
        ("s3://KEY:SEC/RET@bucket/a", "s3://***@bucket/a"),
        ("s3://KEY@bucket/a", "s3://***@bucket/a"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("can't read 's3://KEY:SEC+RET@bucket/a' or '/a@b'", "can't read 's3://***@bucket/a' or '/a@b'"),
        ("/data/a@b", "/data/a@b"),
    ],
)
def test_keys_in_a_uri_are_not_shown(path: str, told: str) -> None:
    assert shown(path) == told


def test_keys_are_not_in_messages(store: ObjectStore) -> None:
    for bad in ("s3://KEY:SECRET@/x", "s3://KEY:SEC^RET@bucket", "s3://KEY:SECRET@bucket?no_such_option=1"):
        with pytest.raises(SettingsError) as caught:
            locate(bad, "output.path")
        assert "SEC" not in str(caught.value)
        assert "output.path: 's3://***@" in str(caught.value)


def test_a_write_is_flushed_and_so_is_its_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    local, folder = pafs.LocalFileSystem(), tmp_path / "new" / "out"
    make_folder(local, str(folder))
    assert flushed == [str(tmp_path / "new"), str(tmp_path)]
    target = str(folder / "x.json")
    for write_one, name in ((write, "x.json"), (create_if_absent, ".x.json."), (replace, ".x.json.")):
        flushed.clear()
        delete(local, [target])
        write_one(local, target, b"1")
        assert [flushed[0], flushed[-1]] == [str(folder)] * 2
        assert Path(flushed[1]).name.startswith(name)
        assert len(flushed) == 3
