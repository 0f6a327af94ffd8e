from __future__ import annotations

import errno
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pyarrow.fs as pafs
import pytest

from hycluster.errors import SettingsError
from hycluster.storage import Folder, WritableFolder, locate, masked
from tests.located import at
from tests.object_store import BUCKET, ObjectStore


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> WritableFolder:
    """A new folder of each kind."""
    if request.param == "disk":
        return at(tmp_path)
    store: ObjectStore = request.getfixturevalue("store")
    return at(store.uri(tmp_path.name))


def test_the_first_of_many_writers_wins(tmp_path: Path) -> None:
    folder = at(tmp_path)
    with ThreadPoolExecutor(8) as writers:
        won = list(writers.map(lambda n: folder.create("record.json", b'{"by": %d}' % n), range(32)))
    assert won.count(True) == 1
    assert folder.read_json("record.json") == {"by": won.index(True)}
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_other_filesystems_are_refused(tmp_path: Path) -> None:
    filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    with pytest.raises(SettingsError, match=r"^output.path: 'x' is on 'subtree'.* must be a local path or an s3://"):
        Folder(filesystem, "x", "x").writable()
    assert not list(tmp_path.iterdir())


def test_one_of_two_writers_wins_in_an_object_store(store: ObjectStore) -> None:
    folder = at(store.uri("rounds"))
    with ThreadPoolExecutor(2) as writers:
        for turn in range(60):
            path = f"{turn}.json"
            together = Barrier(2)

            def attempt(writer: int, path: str = path, together: Barrier = together) -> bool:
                together.wait()
                return folder.create(path, b'{"by": %d}' % writer)

            won = list(writers.map(attempt, range(2)))
            assert won.count(True) == 1
            assert folder.read_json(path) == {"by": won.index(True)}
    assert store.conditional_writes >= 120


def test_an_object_store_is_found_by_the_environment_too(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{store.address}")
    folder = at(f"s3://{BUCKET}/environment")
    assert folder.create("f", b"1")
    assert not folder.create("f", b"2")
    folder.delete(["f", "f"])
    assert not folder.exists("f")


def test_the_keys_of_a_profile_are_enough_to_look_and_to_report(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """'batch status', 'verify' and 'report' go by pyarrow, which knows profiles; obstore finds no keys here."""
    at(store.uri("profile")).create("old", b"{}")
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    # Who asks obstore is to fail soon, not to look for a role.
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    folder = at(store.uri("profile").replace("key:secret@", ""))
    assert folder.read_json("old") == {}
    folder.replace("report.json", b"1")
    assert sorted(folder.names()) == ["old", "report.json"]
    assert folder.exists("report.json")
    with folder.open_stream("report.json") as stream:
        assert stream.read() == b"1"


def test_a_part_is_one_request_however_small(store: ObjectStore) -> None:
    folder = at(store.uri("requests"))
    folder.write("first", b"1")
    before = store.requests
    folder.write("part", b"x" * (4 << 20))
    assert folder.read_whole("part") == b"x" * (4 << 20)
    assert store.requests - before == 2


def test_what_an_object_store_refuses_is_one_line(store: ObjectStore) -> None:
    folder = at(store.uri("x").replace(BUCKET, "no-such-bucket"))
    for attempt in (folder.create, folder.write, lambda path, data: folder.check_creates_once(path)):
        with pytest.raises(OSError, match="NoSuchBucket") as caught:
            attempt("f", b"")
        assert "Debug source" not in str(caught.value)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    at(tmp_path).replace("x.json", b"1")
    at(tmp_path).replace("x.json", b"2")
    assert list(at(tmp_path).names()) == ["x.json"]
    assert target.read_bytes() == b"2"
    assert list(at(tmp_path).names("none")) == []


def test_a_full_disk_is_named_and_leaves_nothing_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for attempt in (at(tmp_path).write, at(tmp_path).create, at(tmp_path).replace):
        with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/\.?part") as caught:
            attempt("part", b"x")
        assert caught.value.errno == errno.ENOSPC
        assert list(tmp_path.iterdir()) == []


def test_a_folder_is_what_it_is_wherever_it_is(folder: WritableFolder) -> None:
    """Disk and bucket answer alike, and so does what is handed on to another process."""
    folder = pickle.loads(pickle.dumps(folder))
    assert not folder.exists("a/b")
    assert list(folder.names()) == list(folder.entries()) == []
    assert (folder.read_json("a/b"), folder.read_whole("a/b")) == (None, None)
    folder.make("a")
    assert folder.create("a/b", b"{}")
    assert not folder.create("a/b", b"")
    folder.below("a").write("c", memoryview(b"x" * (11 << 20)))
    with folder.writing("a/d") as stream:
        stream.write(b"1")
        stream.write(b"2")
    folder.replace("a/b", b'{"n": 1}')
    assert sorted(folder.names("a")) == sorted(folder.below("a").names()) == ["b", "c", "d"]
    assert [info.base_name for info in folder.entries()] == ["a"]
    assert {info.path for info in folder.entries(recursive=True)} >= {folder.at("a/b"), folder.at("a/c")}
    # What they are goes with them: a sweep deletes by their age.
    for info in folder.entries(recursive=True):
        if info.type == pafs.FileType.File:
            there = folder.info(info.path.removeprefix(folder.at("")).removeprefix("/"))
            assert (info.size, info.mtime_ns) == (there.size, there.mtime_ns)
            assert info.mtime_ns
    assert folder.read_json("a/b") == {"n": 1}
    assert (folder.read_whole("a/d"), folder.info("a/c").size) == (b"12", 11 << 20)
    with folder.open_stream("a/d") as stream:
        assert stream.read() == b"12"
    with folder.open_file("a/d") as file:
        assert file.read_at(1, 1) == b"2"
    folder.delete(["a/b", "a/nothing"])
    assert sorted(folder.names("a")) == ["c", "d"]
    folder.delete_tree("a")
    assert list(folder.names("a")) == []
    with pytest.raises(FileNotFoundError):
        folder.delete_tree("nothing")


def test_a_file_that_is_being_replaced_is_read_whole(folder: WritableFolder) -> None:
    path = "f"
    assert folder.read_whole(path) is None
    contents = [b"a" * 10, b"b" * 5000]
    folder.replace(path, contents[0])

    def rewrite() -> None:
        for n in range(60):
            folder.replace(path, contents[n % 2])

    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(rewrite)
        read = {folder.read_whole(path) for _ in range(40)}
        writing.result()
    assert read <= set(contents)
    assert folder.read_whole(path) == contents[1]


def test_local_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("a/b", "input.path").root == str(tmp_path / "a" / "b")
    assert locate(f"file://{tmp_path}/a/", "input.path").root == str(tmp_path / "a")


@pytest.mark.parametrize(
    ("path", "root", "name"),
    [
        ("s3://KEY:SECRET@bucket/a/?region=r", "bucket/a/b/c", "s3://***@bucket/a/b/c?region=r"),
        ("/data/who?", "/data/who?/b/c", "/data/who?/b/c"),
        ("/data/", "/data/b/c", "/data/b/c"),
    ],
)
def test_a_folder_below_says_where_it_is_without_keys(path: str, root: str, name: str) -> None:
    below = locate(path, "input.path").below("b/c")
    assert (below.root, below.masked) == (root, name)
    assert "SECRET" not in repr(below)


def test_a_store_that_ignores_the_condition_is_refused(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = at(store.uri("probed"))
    folder.check_creates_once("x.json")
    monkeypatch.setattr(store, "honours_conditions", False)
    with pytest.raises(SettingsError, match=r"^output.path: bucket 'corpus' is in a store that ignores 'If-None-Match"):
        folder.check_creates_once("x.json")
    assert list(folder.names()) == []


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
    assert masked(path) == told


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
    folder = tmp_path / "new" / "out"
    local = at(folder)
    local.make()
    assert flushed == [str(tmp_path / "new"), str(tmp_path)]
    for write_one, name in ((local.write, "x.json"), (local.create, ".x.json."), (local.replace, ".x.json.")):
        flushed.clear()
        local.delete(["x.json"])
        write_one("x.json", b"1")
        assert [flushed[0], flushed[-1]] == [str(folder)] * 2
        assert Path(flushed[1]).name.startswith(name)
        assert len(flushed) == 3


@pytest.mark.parametrize("name", ["数据/a b", "%E6%95%B0%E6%8D%AE/a%20b"])
def test_names_of_any_alphabet_in_a_uri(name: str, tmp_path: Path) -> None:
    nowhere = "endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    assert locate(f"s3://key:secret@bucket/{name}?{nowhere}", "input.path").root == "bucket/数据/a b"
    assert locate(f"file://{tmp_path}/{name}", "input.path").root == f"{tmp_path}/数据/a b"
