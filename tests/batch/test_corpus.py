from __future__ import annotations

import itertools
import pickle
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from hycluster.batch.corpus import ROW_ID, SHARD, SHARD_BYTES, File, Plan, Shard, Span, plan, read, spans
from hycluster.errors import JobFailed, SettingsError
from tests.batch.conftest import write_texts


def accept(schema: pa.Schema, where: str) -> None:
    assert schema.names, where


def planned(path: Path | str, shard_rows: int = 2) -> Plan:
    return plan(str(path), shard_rows=shard_rows, check=accept)


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
        ("nowhere.parquet", "no such file or folder"),
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
        planned("nfs2://x/y")


def test_what_is_not_parquet_is_named(corpus: Path) -> None:
    (corpus / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(SettingsError, match=r"^input: broken.parquet: is not a readable Parquet file: "):
        planned(corpus)


def test_a_column_that_the_output_needs_is_refused(corpus: Path) -> None:
    pq.write_table(pa.table({"text": ["x"], "output": ["y"]}), corpus / "c.parquet")
    with pytest.raises(SettingsError, match=r"^input: c.parquet: column 'output' .* rename it"):
        planned(corpus)


def test_every_file_is_checked(corpus: Path) -> None:
    seen = []
    plan(str(corpus), shard_rows=2, check=lambda schema, where: seen.append(where))
    assert sorted(seen) == ["input: a/z.parquet", "input: b.parquet"]


@pytest.mark.parametrize("row_group_size", [1, 2, 3, 100])
@pytest.mark.parametrize("picked", [slice(None), slice(2, 4), slice(None, None, 3)])
def test_shards_hold_their_rows_whatever_the_row_groups(tmp_path: Path, row_group_size: int, picked: slice) -> None:
    write_texts(tmp_path / "f.parquet", [f"t{n}" for n in range(11)], row_group_size=row_group_size)
    whole = planned(tmp_path)
    shards = list(whole.shards())[picked]
    tables = list(read(whole.filesystem, whole.root, shards))
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
        list(read(whole.filesystem, whole.root, list(whole.shards())))


def test_a_file_that_has_gone_fails_the_job(corpus: Path) -> None:
    whole = planned(corpus)
    (corpus / "b.parquet").unlink()
    with pytest.raises(JobFailed, match=r"^input: b.parquet: can't be read"):
        list(read(whole.filesystem, whole.root, list(whole.shards())))


def file_of(rows: int, row_bytes: int, schema: str = "s") -> File:
    return File("f", rows * row_bytes, (rows,), rows * row_bytes, schema)


def plan_of(*files: File, shard_rows: int = 256) -> Plan:
    return Plan(pafs.LocalFileSystem(), "/", ("f",), files, shard_rows)


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
