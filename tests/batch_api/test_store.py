from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hycluster.batch_api.records import State, new_record_id
from hycluster.batch_api.store import Store
from hycluster.errors import InvalidInput, NotFound
from hycluster.settings.ingress import Batches
from tests.batch_api.stand_in import submit


def upload(store: Store, content: bytes = b"{}\n", name: str = "in.jsonl", expires_after_s: int | None = None) -> str:
    return store.add_file(io.BytesIO(content), name, expires_after_s).id


def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on with every look, so that what is made later is later."""
    ticks = iter(range(10**9, 10**10))
    monkeypatch.setattr("hycluster.batch_api.records.time.time_ns", lambda: next(ticks) * 1_000_000)


class TestFiles:
    def test_a_file_comes_back_as_it_was(self, store: Store) -> None:
        content = os.urandom(3 << 20)
        file = store.file(upload(store, content, "/home/me/in.jsonl"))
        assert (file.bytes, file.filename, file.purpose, file.expires_at) == (3 << 20, "in.jsonl", "batch", None)
        assert b"".join(store.chunks(store.open_content(file.id))) == content

    def test_an_empty_one_is_refused_and_leaves_nothing(self, store: Store) -> None:
        with pytest.raises(InvalidInput, match="file: is empty"):
            upload(store, b"")
        assert not list((Path(store.folder.root) / "content").iterdir())

    @pytest.mark.parametrize("wrong", ["file-1", "../files/x", "", f"file-{'0' * 36}", "batch_" + "0" * 36])
    def test_what_is_no_id_touches_no_path(self, store: Store, wrong: str) -> None:
        upload(store)
        with pytest.raises(NotFound, match="there is no file"):
            store.file(wrong)

    def test_deleted(self, store: Store) -> None:
        name = upload(store)
        store.delete_file(name)
        with pytest.raises(NotFound):
            store.file(name)
        with pytest.raises(NotFound):
            store.open_content(name)

    def test_content_without_a_record_is_no_file(self, store: Store) -> None:
        name = new_record_id("file-")
        store.write_content(name, iter([b"x"]))
        with pytest.raises(NotFound):
            store.file(name)
        assert store.list_files(None, 10, purpose=None, newest_first=True) == []

    def test_lists(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        ticking(monkeypatch)
        ids = [upload(store) for _ in range(40)]
        made = store.register(ids[7], 1, "out", "batch_output")

        def listed(after: str | None, limit: int, purpose: str | None = None, newest_first: bool = True) -> list[str]:
            found = store.list_files(after, limit, purpose=purpose, newest_first=newest_first)
            return [file.id for file in found]

        assert listed(None, 100) == ids[::-1]
        assert listed(None, 3) == ids[:-4:-1]
        assert listed(ids[10], 100) == ids[:10][::-1]
        assert listed(ids[10], 2, newest_first=False) == ids[11:13]
        assert listed(None, 1, purpose="batch_output") == [made.id]

    def test_an_expired_one_is_gone_and_swept(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        kept, gone = upload(store), upload(store, expires_after_s=3600)
        assert store.file(gone).expires_at is not None
        now = time.time()
        monkeypatch.setattr("hycluster.batch_api.store.time.time", lambda: now + 3601)
        with pytest.raises(NotFound):
            store.file(gone)
        assert [f.id for f in store.list_files(None, 9, purpose=None, newest_first=True)] == [kept]
        store.sweep()
        assert [path.name for path in (Path(store.folder.root) / "content").iterdir()] == [kept]

    def test_keep_days(self, tmp_path: Path) -> None:
        store = Store(Batches(store=str(tmp_path), keep_days=2))
        file = store.file(upload(store))
        assert file.expires_at == file.created_at + 2 * 86400

    def test_sweep_takes_old_leftovers_only(self, store: Store) -> None:
        old, new = new_record_id("file-"), new_record_id("file-")
        for name in (old, new):
            store.write_content(name, iter([b"x"]))
        kept = upload(store)
        for name in (old, kept):
            os.utime(Path(store.folder.root) / "content" / name, (0, 0))
        store.sweep()
        assert {path.name for path in (Path(store.folder.root) / "content").iterdir()} == {new, kept}


class TestBatches:
    def test_a_batch_is_open_until_it_is_closed(self, store: Store) -> None:
        batch = submit(store, "x")
        assert store.batch(batch.id) == batch
        assert store.open_batches() == [batch.id]
        assert store.state(batch.id) == State()
        work = Path(store.work(batch.id).root)
        work.mkdir(parents=True)
        (work / "part").touch()
        for _ in range(2):
            store.close_batch(batch.id)
        assert store.open_batches() == []
        assert not work.exists()
        assert store.batch(batch.id) == batch

    def test_the_first_wish_to_cancel_counts(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        batch = submit(store, "x")
        assert store.cancelling_at(batch.id) is None
        store.cancel(batch.id)
        at = store.cancelling_at(batch.id)
        monkeypatch.setattr("hycluster.batch_api.store.time.time", lambda: 2e9)
        store.cancel(batch.id)
        assert store.cancelling_at(batch.id) == at

    def test_newest_first(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        ticking(monkeypatch)
        ids = [submit(store, "x").id for _ in range(5)]
        assert [batch.id for batch in store.list_batches(None, 2)] == [ids[4], ids[3]]
        assert [batch.id for batch in store.list_batches(ids[3], 9)] == [ids[2], ids[1], ids[0]]

    def test_the_work_folder_of_a_uri(self) -> None:
        store = Store(Batches(store="s3://k:s@bucket/a/?endpoint_override=localhost:1&scheme=http"))
        work = store.work("b")
        assert work.root == "bucket/a/jobs/b"
        assert work.masked == "s3://***@bucket/a/jobs/b?endpoint_override=localhost:1&scheme=http"

    def test_the_work_folder_is_in_the_store_whatever_its_name(self, tmp_path: Path) -> None:
        store = Store(Batches(store=str(tmp_path / "who?")))
        batch = submit(store, "x")
        store.work(batch.id).make()
        assert [path.name for path in (tmp_path / "who?" / "jobs").iterdir()] == [batch.id]
        store.close_batch(batch.id)
        assert not list((tmp_path / "who?" / "jobs").iterdir())


@pytest.mark.parametrize("nothing", [Store.open_batches, Store.sweep, lambda store: store.list_batches(None, 5)])
def test_a_store_that_is_not_there_yet(settings: Batches, nothing: Callable[[Store], object]) -> None:
    assert not nothing(Store(settings))
    assert settings.store is not None
    assert not Path(settings.store).exists()
