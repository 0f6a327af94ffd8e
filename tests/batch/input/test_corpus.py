from __future__ import annotations

import hashlib
import itertools
import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import stamina

from hycluster.batch.input import row_groups as decode
from hycluster.batch.input.corpus import (
    REFUSAL,
    ROW_ID,
    SHARD,
    SHARD_BYTES,
    File,
    Shard,
    ShardPlan,
    Span,
    plan_shards,
    read_shards,
    spans,
)
from hycluster.batch.prompts import TemplatePrompt
from hycluster.errors import JobFailed, SettingsError
from hycluster.storage import Folder, locate
from tests.batch.conftest import damage, write_texts
from tests.located import at


def accept(schema: pa.Schema, where: str) -> None:
    assert schema.names, where


def planned(path: Path | str, shard_rows: int = 2) -> ShardPlan:
    return plan_shards(at(path), shard_rows=shard_rows, check=accept)


def cuts(path: Path | str) -> list[tuple[str, int, int]]:
    return [(shard.file.path, shard.first_row, shard.rows) for shard in planned(path, 3).shards()]


def test_a_folder_is_read_at_any_depth_in_order_of_paths(corpus: Path) -> None:
    write_texts(corpus / "_skipped.parquet", ["no"])
    write_texts(corpus / ".hidden" / "x.parquet", ["no"])
    (corpus / "notes.txt").write_text("no")
    assert cuts(corpus) == [
        ("a/z.parquet", 0, 3),
        ("a/z.parquet", 3, 2),
        ("b.parquet", 0, 3),
        ("b.parquet", 3, 3),
        ("b.parquet", 6, 1),
    ]


def test_the_plan_is_a_pure_function_of_the_input(corpus: Path) -> None:
    first, second = planned(corpus), planned(f"file://{corpus}")
    assert list(first.shards()) == list(second.shards())
    assert first.digest() == second.digest()
    assert first.digest() != planned(corpus, 3).digest()
    write_texts(corpus / "b.parquet", ["other"] * 7)
    assert first.digest() != planned(corpus).digest()


def test_one_file_is_named_by_itself(corpus: Path) -> None:
    assert {path for path, _, _ in cuts(corpus / "b.parquet")} == {"b.parquet"}


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.parquet", ["b.parquet"]),
        ("**/*.parquet", ["a/z.parquet", "b.parquet"]),
        ("?/[xyz].parquet", ["a/z.parquet"]),
        ("**", ["a/z.parquet", "b.parquet"]),
    ],
)
def test_globs(corpus: Path, pattern: str, found: list[str]) -> None:
    assert [file.path for file in planned(corpus / pattern).files] == found


def test_a_file_with_a_glob_in_its_name_is_taken_by_its_name(corpus: Path) -> None:
    write_texts(corpus / "part[1].parquet", ["x"])
    assert [file.path for file in planned(corpus / "part[1].parquet").files] == ["part[1].parquet"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere.parquet", "no such file or folder$"),
        ("emtpy", r"no such file or folder \(did you mean '.*/empty'\?\)$"),
        ("empty", r"no \*.parquet file in this folder"),
        ("*.csv", "no file matches"),
        ("nowhere/*.parquet", "there is no folder"),
    ],
)
def test_input_that_is_not_there_is_named(corpus: Path, path: str, said: str) -> None:
    (corpus / "empty").mkdir()
    with pytest.raises(SettingsError, match=f"^input.path: '.*{said}"):
        planned(corpus / path)


def test_a_scheme_that_does_not_exist_is_named() -> None:
    with pytest.raises(SettingsError, match=r"^input.path: 'nfs2://x/y' can't be used"):
        locate("nfs2://x/y", "input.path")


@pytest.fixture(autouse=True)
def no_backoff() -> Iterator[None]:
    with stamina.set_testing(True, attempts=3):
        yield


def test_an_input_of_which_no_file_can_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "empty.parquet").touch()
    with pytest.raises(SettingsError, match=r"^input: broken.parquet: is not a readable Parquet file: "):
        planned(tmp_path)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    "harm", [cut_off, lambda path: path.write_bytes(b""), lambda path: path.write_text("a,b\n1,2")]
)
def test_a_file_that_cannot_be_read_is_one_row_of_its_name(corpus: Path, harm: Callable[[Path], object]) -> None:
    before = planned(corpus)
    harm(corpus / "a" / "z.parquet")
    whole = planned(corpus)
    unreadable, readable = whole.files
    assert unreadable.fault is not None
    assert unreadable.fault.error_message.startswith("input: a/z.parquet: is not a readable Parquet file: ")
    assert (unreadable.rows, unreadable.bytes) == (1, (corpus / "a" / "z.parquet").stat().st_size)
    assert whole.rows == 1 + 7
    assert whole.digest() != before.digest()
    row_bytes = readable.bytes / 7
    assert whole.unseen_rows == max(0, round(unreadable.bytes / row_bytes) - 1)
    (table,) = read_shards(whole.folder, list(whole.shards())[:1])
    assert table.to_pylist() == [
        {
            ROW_ID: "a/z.parquet",
            SHARD: 0,
            REFUSAL: {"error_type": "UnreadableFile", "error_message": unreadable.fault.error_message},
        }
    ]


def test_a_file_weighs_what_its_size_would_hold(corpus: Path) -> None:
    size = (corpus / "b.parquet").stat().st_size
    (corpus / "big.parquet").write_bytes(b"x" * size * 100)
    whole = planned(corpus / "b*.parquet")
    assert (whole.rows, whole.unseen_rows) == (8, 699)


def test_files_at_fault_come_first(corpus: Path) -> None:
    (corpus / "c.parquet").write_bytes(b"")
    pq.write_table(pa.table({"id": [1, 2, 3]}), corpus / "bb.parquet")
    whole = plan_shards(at(corpus), shard_rows=2, check=TemplatePrompt("{text}", {}, {}).check)
    assert [file.fault.error_type if file.fault else None for file in whole.files] == [
        None,
        None,
        "MissingColumn",
        "UnreadableFile",
    ]
    left = [shard.number for shard in whole.in_order({0, 8})]
    assert left == [9, 7, 1, 2, 3, 4, 5, 6]
    assert sorted([*left, 0, 8]) == [shard.number for shard in whole.shards()]


class Stumbling:
    """A filesystem that does not answer the first so many times that a file is opened."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.real = pafs.LocalFileSystem()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def open_input_file(self, path: str) -> pa.NativeFile:
        self.left -= 1
        if self.left >= 0:
            raise OSError("the store is busy")
        return self.real.open_input_file(path)


def test_a_store_that_stumbles_is_asked_again(corpus: Path) -> None:
    store = Stumbling(2)
    whole = plan_shards(Folder(store, str(corpus / "b.parquet"), ""), shard_rows=2, check=accept)
    assert [file.fault for file in whole.files] == [None]
    store.left = 2
    assert sum(table.num_rows for table in read_shards(whole.folder, list(whole.shards()))) == 7
    store.left = 100
    with pytest.raises(JobFailed, match=r"^input: b.parquet: can't be read: the store is busy"):
        list(read_shards(whole.folder, list(whole.shards())))


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "zstd"}, {"compression": "none"}, {"compression": "none", "write_page_checksum": True}],
)
@pytest.mark.parametrize("nullable", [True, False])
def test_rows_that_cannot_be_decoded_are_refused_and_no_others(
    tmp_path: Path, options: dict[str, Any], nullable: bool
) -> None:
    path = tmp_path / "f.parquet"
    schema = pa.schema([pa.field("text", pa.string(), nullable=nullable), pa.field("n", pa.int64())])
    texts = [f"text number {row} " + "x" * (row % 7) for row in range(40)]
    pq.write_table(pa.table([texts, range(40)], schema), path, row_group_size=10, use_dictionary=False, **options)
    whole = planned(tmp_path, shard_rows=4)
    damage(path, 1, 0)
    for span in ([*whole.shards()], [*whole.shards()][2:3], [*whole.shards()][4:]):
        table = pa.concat_tables(read_shards(whole.folder, span), promote_options="default")
        first = span[0].first_row
        assert table.column(ROW_ID).to_pylist() == [f"f.parquet#{first + row}" for row in range(table.num_rows)]
        for place, row in enumerate(table.to_pylist()):
            if 10 <= first + place < 20:
                assert (row["text"], row["n"]) == (None, None)
                assert row[REFUSAL]["error_type"] == "UnreadableRows"
                assert row[REFUSAL]["error_message"].startswith(
                    "row group 1 of this file is damaged from its row 0 on: "
                )
            else:
                assert (row["text"], row["n"]) == (texts[first + place], first + place)
                assert row.get(REFUSAL) is None


def test_what_comes_before_the_damage_in_a_large_row_group_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "READ_ROWS", 100)
    path = tmp_path / "f.parquet"
    texts = [hashlib.sha256(bytes([row % 256])).hexdigest() for row in range(1000)]
    pq.write_table(
        pa.table({"text": texts}),
        path,
        use_dictionary=False,
        data_page_size=2000,
        write_batch_size=10,
        compression="none",
    )
    whole = planned(tmp_path, shard_rows=300)
    damage(path, 0, 0)
    table = pa.concat_tables(read_shards(whole.folder, list(whole.shards())), promote_options="default")
    bad = [row for row, value in enumerate(table.column("text").to_pylist()) if value is None]
    assert bad == list(range(bad[0], 1000))
    assert bad[0] in (400, 500)
    assert table.column("text").to_pylist()[: bad[0]] == texts[: bad[0]]


def test_a_store_that_goes_away_amid_a_file_is_no_damage(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = planned(corpus / "b.parquet")

    def away(*_: Any, **__: Any) -> Any:
        raise OSError("the store is away")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", away)
    monkeypatch.setattr(decode, "_read_raw", away)
    with pytest.raises(JobFailed, match=r"^input: b.parquet: can't be read: row group 0: the store is away"):
        list(read_shards(whole.folder, list(whole.shards())))


def test_a_column_that_jobs_use_within_is_refused_in_any_file(corpus: Path) -> None:
    check = TemplatePrompt("{text}", {}, {}).check
    pq.write_table(pa.table({"text": [1], "__hycluster_refusal": ["y"]}), corpus / "c.parquet")
    with pytest.raises(SettingsError, match=r"^input: c.parquet: column '__hycluster_refusal'"):
        plan_shards(at(corpus), shard_rows=2, check=check)


def test_columns_that_are_wrong_in_every_file_are_refused(corpus: Path) -> None:
    with pytest.raises(SettingsError, match=r"^input: a/z.parquet: no column 'words'; there are id, text"):
        plan_shards(at(corpus), shard_rows=2, check=TemplatePrompt("{words}", {}, {}).check)


def test_columns_that_are_wrong_in_one_file_refuse_its_rows(corpus: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2, 3], "text": [[1], None, [3]]}), corpus / "c.parquet")
    whole = plan_shards(at(corpus), shard_rows=2, check=TemplatePrompt("{text}", {}, {}).check)
    assert whole.rows == 15
    assert whole.unseen_rows == 0
    tables = list(read_shards(whole.folder, list(whole.shards())[-2:]))
    assert [table.column("text").to_pylist() for table in tables] == [[[1], None], [[3]]]
    assert [table.column(ROW_ID).to_pylist() for table in tables] == [["c.parquet#0", "c.parquet#1"], ["c.parquet#2"]]
    message = "input: c.parquet: column 'text' is list<element: int64>; a template takes text, numbers and dates"
    for table in tables:
        assert set(table.column(REFUSAL).combine_chunks().field("error_message").to_pylist()) == {message}
        assert set(table.column(REFUSAL).combine_chunks().field("error_type").to_pylist()) == {"WrongType"}


def test_every_file_is_checked(corpus: Path) -> None:
    seen = []
    plan_shards(at(corpus), shard_rows=2, check=lambda schema, where: seen.append(where))
    assert sorted(seen) == ["input: a/z.parquet", "input: b.parquet"]


@pytest.mark.parametrize("row_group_size", [1, 2, 3, 100])
@pytest.mark.parametrize("picked", [slice(None), slice(2, 4), slice(None, None, 3)])
def test_shards_hold_their_rows_whatever_the_row_groups(tmp_path: Path, row_group_size: int, picked: slice) -> None:
    write_texts(tmp_path / "f.parquet", [f"t{n}" for n in range(11)], row_group_size=row_group_size)
    whole = planned(tmp_path)
    shards = list(whole.shards())[picked]
    tables = list(read_shards(whole.folder, shards))
    assert len(tables) == len(shards)
    for shard, table in zip(shards, tables, strict=True):
        rows = range(shard.first_row, shard.first_row + shard.rows)
        assert table.column("text").to_pylist() == [f"t{n}" for n in rows]
        assert table.column(ROW_ID).to_pylist() == [f"f.parquet#{n}" for n in rows]
        assert set(table.column(SHARD).to_pylist()) == {shard.number}


def test_a_file_that_changed_since_it_was_planned_fails_the_job(corpus: Path) -> None:
    whole = planned(corpus)
    write_texts(corpus / "b.parquet", ["x"])
    with pytest.raises(JobFailed, match=r"^input: b.parquet: has changed"):
        list(read_shards(whole.folder, list(whole.shards())))


def test_a_file_that_has_gone_fails_the_job(corpus: Path) -> None:
    whole = planned(corpus)
    (corpus / "b.parquet").unlink()
    with pytest.raises(JobFailed, match=r"^input: b.parquet: can't be read"):
        list(read_shards(whole.folder, list(whole.shards())))


def file_of(rows: int, row_bytes: int, schema: str = "s") -> File:
    return File("f", rows * row_bytes, (rows,), rows * row_bytes, schema)


def plan_of(*files: File, shard_rows: int = 256) -> ShardPlan:
    return ShardPlan(at("/"), ("f",), files, shard_rows)


def test_ten_million_rows_are_planned_one_shard_at_a_time() -> None:
    whole = plan_of(file_of(10_000_000, 100))
    tracemalloc.start()
    count = sum(1 for _ in whole.shards())
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == whole.shard_count == -(-10_000_000 // 256)
    assert peak_bytes < 100_000
    assert [shard.number for shard in itertools.islice(whole.shards(), 3)] == [0, 1, 2]


def test_wide_rows_make_small_shards() -> None:
    assert next(plan_of(file_of(100, SHARD_BYTES // 3)).shards()).rows == 3
    assert next(plan_of(file_of(100, SHARD_BYTES * 3)).shards()).rows == 1


def test_spans_hold_one_schema_and_little_at_once() -> None:
    files = (file_of(4, 10, "a"), file_of(4, 10, "b"))
    shards = list(plan_of(*files, shard_rows=1).shards())

    def sizes(span_bytes: int) -> list[int]:
        return [len(span) for span in spans(shards, span_bytes)]

    assert sizes(1000) == [4, 4]
    assert sizes(30) == [3, 1, 3, 1]
    assert sizes(0) == [1] * 8
    assert [len(span) for span in spans([Shard(0, files[0], 0, 1)] * 100)] == [64, 36]


def test_a_span_gives_back_its_shards_and_holds_runs_of_them() -> None:
    # The last shard of each file is shorter.
    shards = list(plan_of(file_of(10, 8), file_of(10, 8), file_of(9, 8), shard_rows=3).shards())
    for picked in (shards, shards[1:3], shards[::2], [s for s in shards if s.number not in (2, 5)], shards[:1], []):
        span = Span(picked)
        assert list(span) == picked
        assert (len(span), span.rows) == (len(picked), sum(shard.rows for shard in picked))
        assert span.bytes == sum(shard.bytes for shard in picked)
        assert list(pickle.loads(pickle.dumps(span))) == picked
    assert len(Span(shards)._runs) == 3
    assert len(Span(shards[:3] + shards[4:6])._runs) == 2


def test_a_shard_after_a_shorter_one_begins_a_run_of_its_own() -> None:
    file = file_of(10, 8)
    odd = [Shard(0, file, 0, 4), Shard(1, file, 4, 2), Shard(2, file, 6, 4), Shard(3, file, 0, 4)]
    assert list(Span(odd)) == odd


def test_an_empty_file_has_no_shards(tmp_path: Path) -> None:
    write_texts(tmp_path / "e.parquet", [])
    assert list(planned(tmp_path).shards()) == []
