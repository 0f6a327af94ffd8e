"""Files that strangers write, through plan, read, commit and verify: none ends a job, no column comes out changed."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from hycluster.batch.input import footers as footers_module
from hycluster.batch.input import row_groups
from hycluster.batch.input.apart import footers_apart
from hycluster.batch.input.corpus import ROW_ID, plan_shards, read_shards
from hycluster.batch.input.tables import pack, unpack, unwritable
from hycluster.batch.job import Job
from hycluster.batch.output.verify import verify_output
from hycluster.batch.prompts import prompt_of
from hycluster.batch.run import run_job
from hycluster.errors import SettingsError
from tests.batch.committed import commit_all, parts
from tests.batch.conftest import MakeJob, damage, write_texts
from tests.located import at

REQUIRED = pa.struct([pa.field("a", pa.int32(), nullable=False)])
ROWS = 6
KINDS: dict[str, tuple[pa.DataType, Any]] = {
    "string views": (pa.string_view(), ["x", None, "a string that is longer than twelve bytes", "", "z", "y"]),
    "binary views": (pa.binary_view(), [b"\xff", None, b"", b"a", b"b", b"c"]),
    "views in lists": (pa.list_(pa.string_view()), [["x"], None, [], ["y", None], ["z"], []]),
    "views in structs": (pa.struct([("v", pa.string_view())]), [{"v": "x"}, None, {"v": None}, *[{"v": "y"}] * 3]),
    "views in maps": (pa.map_(pa.string(), pa.string_view()), [[("k", "x")], None, [], *[[("l", "y")]] * 3]),
    "list views": (pa.list_view(pa.int8()), [[1], None, [], [2, 3], [4], []]),
    "required within": (REQUIRED, [{"a": n} for n in range(ROWS)]),
    "required within fixed lists": (
        pa.list_(pa.field("item", pa.int8(), nullable=False), 2),
        [[n, n] for n in range(ROWS)],
    ),
    "required within list views": (pa.list_view(pa.field("item", pa.int8(), nullable=False)), [[n] for n in range(6)]),
    "nothing": (pa.null(), [None] * ROWS),
    "uuids": (pa.uuid(), [bytes([n] * 16) for n in range(ROWS)]),
    "uuids in structs": (
        pa.struct([("u", pa.uuid())]),
        pa.StructArray.from_arrays([pa.array([bytes([n] * 16) for n in range(ROWS)], pa.uuid())], ["u"]),
    ),
    "JSON in lists": (
        pa.list_(pa.json_()),
        pa.ListArray.from_arrays([0, None, 2, 2, 3, 3, 4], pa.array(["1", None, "{}", "2"], pa.json_())),
    ),
    "JSON": (pa.json_(), ["1", None, "{}", "[]", '"x"', "null"]),
}


def through(make_job: MakeJob, corpus: Path, **changes: Any) -> list[pa.Table]:
    """The parts of a job over all of ``corpus``, after a proof that they are right."""
    out = commit_all(make_job(**changes))
    assert verify_output(at(out), at(corpus)).faults == []
    return [pq.ParquetFile(path).read() for path in parts(out)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", [False, True], ids=["whole", "damaged"])
def test_columns_of_any_type_come_out_unchanged(make_job: MakeJob, corpus: Path, kind: str, harm: bool) -> None:
    odd, values = KINDS[kind]
    texts = [None, *(f"text {n} " + "x" * n for n in range(1, ROWS))]
    column = values if isinstance(values, pa.Array) else pa.array(values, odd)
    schema = pa.schema([("text", pa.string()), pa.field("odd", odd, nullable=column.null_count > 0)])
    table = pa.table([pa.array(texts, pa.string()), column], schema)
    with pq.ParquetWriter(corpus / "c.parquet", table.schema) as writer:
        # No row group and no shard ends where the other does.
        for begin in (0, 3):
            (group,) = unpack(pack(table.slice(begin, 3)))
            writer.write_table(group)
    if harm:
        damage(corpus / "c.parquet", 1, 0)
    found = [part for part in through(make_job, corpus, shard_rows=4) if "odd" in part.schema.names]
    whole = pa.concat_tables([part.select(["odd"]) for part in found], promote_options="default")
    assert str(whole.schema.field("odd").type).replace(" not null", "") == str(
        pq.ParquetFile(corpus / "c.parquet").schema_arrow.field("odd").type
    ).replace(" not null", "")
    expected = table.column("odd").slice(1, 2 if harm else ROWS)
    assert whole.column("odd").to_pylist() == expected.to_pylist()


def test_columns_that_share_a_name_come_out_as_they_are(make_job: MakeJob, corpus: Path) -> None:
    table = pa.table([["a", None, "c"], [1, 2, 3], [4.5, None, 6.5]], names=["text", "twice", "twice"])
    pq.write_table(table, corpus / "c.parquet")
    *_, part = through(make_job, corpus, shard_rows=10)
    assert part.schema.names[:4] == ["text", "twice", "twice", ROW_ID]
    assert [part.column(place).to_pylist() for place in (1, 2)] == [[1, 3], [4.5, 6.5]]


def test_a_name_that_is_not_the_jobs_alone_refuses_its_file_and_no_other(make_job: MakeJob, corpus: Path) -> None:
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), corpus / "c.parquet")
    job = make_job()
    *_, odd = plan_shards(at(corpus), shard_rows=2, check=prompt_of(job).check).files
    assert odd.fault is not None
    assert (odd.fault.error_type, odd.fault.error_message) == (
        "WrongType",
        "input: c.parquet: 2 columns named 'text'; there are text, text",
    )
    through(make_job, corpus)


def test_a_type_that_can_be_read_and_not_written_is_told_before_anything_is_asked(
    make_job: MakeJob, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kinds that are left differ between versions of Arrow; one that it can't write stands in for them.
    why = unwritable(pa.schema([("text", pa.string()), ("odd", pa.struct([]))]))
    assert why is not None
    assert why.startswith("column 'odd' is struct<>, which can be read and not written: ")
    assert unwritable(pa.schema([("odd", kind) for kind, _ in KINDS.values()])) is None
    monkeypatch.setattr(footers_module, "unwritable", lambda schema: why if "id" in schema.names else None)
    pq.write_table(pa.table({"text": ["a"]}), corpus / "c.parquet")
    files = plan_shards(at(corpus), shard_rows=2, check=prompt_of(make_job()).check).files
    assert [file.fault.error_message if file.fault else None for file in files] == [
        f"input: a/z.parquet: {why}",
        f"input: b.parquet: {why}",
        None,
    ]


def make_required(path: Path, column: str) -> None:
    """Say in the footer that a column must not be null; nothing else tells of it."""
    name = column.encode()
    written = path.read_bytes()
    # Thrift's compact form: field 3 (repetition) is 1, optional; field 4 is the name.
    optional = b"\x25\x02\x18" + bytes([len(name)]) + name
    assert written.count(optional) == 1
    path.write_bytes(written.replace(optional, b"\x25\x00" + optional[2:]))


@pytest.mark.parametrize("rows", [0, 3])
def test_a_column_of_nothing_that_must_not_be_null(make_job: MakeJob, corpus: Path, rows: int) -> None:
    table = pa.table({"text": pa.array(["a"] * rows, pa.string()), "odd": pa.nulls(rows)})
    pq.write_table(table, corpus / "c.parquet", store_schema=False)
    make_required(corpus / "c.parquet", "odd")
    assert not pq.ParquetFile(corpus / "c.parquet").schema_arrow.field("odd").nullable
    through(make_job, corpus)


@pytest.mark.parametrize(
    "times",
    [
        ["9999-12-31", "2024-01-01 00:00:00.000007", None],
        ["0001-01-01", None, "2262-04-12"],
        ["2024-01-01", None, "1990-01-01 00:00:00.000001"],
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_old_timestamps_keep_their_dates(
    make_job: MakeJob, corpus: Path, times: list[str | None], nested: bool
) -> None:
    kind = pa.timestamp("us")
    column = pa.array(times).cast(kind)
    if nested:
        column = pa.ListArray.from_arrays([0, 1, 2, 3], column)
    table = pa.table({"text": ["a", "b", "c"], "when": column})
    pq.write_table(table, corpus / "c.parquet", use_deprecated_int96_timestamps=True)
    *_, part = through(make_job, corpus, shard_rows=10)
    assert part.column("when").cast(column.type).to_pylist() == column.to_pylist()


def test_old_timestamps_of_nanoseconds_keep_their_digits(make_job: MakeJob, corpus: Path) -> None:
    table = pa.table({"text": ["a", "b"], "when": pa.array([2**62 + 1, 1], pa.timestamp("ns"))})
    pq.write_table(table, corpus / "c.parquet", use_deprecated_int96_timestamps=True)
    *_, part = through(make_job, corpus, shard_rows=10)
    assert part.column("when").equals(table.column("when"))


class Keys(pe.KmsClient):  # type: ignore[misc]
    """Keeps no secret."""

    def __init__(self, _: Any) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64decode(key)


def write_encrypted(path: Path, *, plaintext_footer: bool) -> None:
    """A file whose column ``text`` is encrypted."""
    table = pa.table({"id": [1, 2], "text": ["a", "b"]})
    config = pe.EncryptionConfiguration(
        footer_key="footer", column_keys={"column": ["text"]}, plaintext_footer=plaintext_footer
    )
    made = pe.CryptoFactory(Keys).file_encryption_properties(pe.KmsConnectionConfig(), config)
    with pq.ParquetWriter(path, table.schema, encryption_properties=made) as writer:
        writer.write_table(table)


def test_a_file_that_ends_its_reader_costs_itself(make_job: MakeJob, corpus: Path) -> None:
    write_encrypted(corpus / "aa.parquet", plaintext_footer=True)
    write_encrypted(corpus / "c.parquet", plaintext_footer=False)
    files = plan_shards(at(corpus), shard_rows=2, check=prompt_of(make_job()).check, read_footers=footers_apart).files
    assert [(file.path, file.unreadable) for file in files] == [
        ("a/z.parquet", False),
        ("aa.parquet", True),
        ("b.parquet", False),
        ("c.parquet", True),
    ]
    assert files[1].fault is not None
    assert files[1].fault.error_message.endswith(
        "aa.parquet: is not a readable Parquet file: its footer ends the process that reads it (SIGABRT)"
    )
    through(make_job, corpus)


def test_a_job_reads_no_footer_in_its_own_process(
    make_job: MakeJob, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_encrypted(corpus / "c.parquet", plaintext_footer=True)

    def engines(_: Job) -> Any:
        raise SettingsError("planned")

    with pytest.raises(SettingsError, match="planned"):
        run_job(make_job(max_quarantined_fraction=1), engines=engines)
    said = "quarantined: UnreadableFile: input: c.parquet: is not a readable Parquet file: its footer ends the process"
    assert said in capsys.readouterr().out


def patch_rows(path: Path, claimed: int) -> None:
    """Let the footer claim so many rows."""
    data = path.read_bytes()
    rows = pq.ParquetFile(path).metadata.num_rows
    assert rows < 64
    footer = int.from_bytes(data[-8:-4], "little")
    varint = b""
    left = claimed << 1
    while True:
        varint += bytes([left & 0x7F | (0x80 if left > 0x7F else 0)])
        left >>= 7
        if not left:
            break
    body = data[-8 - footer : -8]
    # Thrift's compact form: field 3 of the file and of a row group is its number of rows.
    changed = body.replace(b"\x16" + bytes([rows << 1]), b"\x16" + varint)
    assert changed != body
    path.write_bytes(data[: -8 - footer] + changed + len(changed).to_bytes(4, "little") + b"PAR1")


def test_a_small_file_that_claims_billions_of_rows_is_not_believed(make_job: MakeJob, corpus: Path) -> None:
    pq.write_table(pa.table({"text": ["a"] * 37}), corpus / "c.parquet")
    patch_rows(corpus / "c.parquet", 6_000_000_000)
    assert pq.ParquetFile(corpus / "c.parquet").metadata.num_rows == 6_000_000_000
    *_, odd = plan_shards(at(corpus), shard_rows=2, check=prompt_of(make_job()).check).files
    assert odd.fault is not None
    assert "is damaged: its footer claims" in odd.fault.error_message
    through(make_job, corpus)


def test_rows_that_a_footer_claims_and_no_page_holds(
    make_job: MakeJob, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_groups, "READ_ROWS", 16)
    pq.write_table(pa.table({"text": ["a"] * 37}), corpus / "c.parquet")
    patch_rows(corpus / "c.parquet", 300)
    found = through(make_job, corpus, shard_rows=100)
    assert sum(part.num_rows for part in found) == 12 + 37


def shift(what: str, by: int) -> Callable[[Path], None]:
    """Damage the footer: some bytes of the place of a column's data are others."""

    def harm(path: Path) -> None:
        chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
        data = path.read_bytes()
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        value = getattr(chunk, what)

        def varint(number: int) -> bytes:
            number, found = number << 1, b""
            while number > 0x7F:
                found += bytes([number & 0x7F | 0x80])
                number >>= 7
            return found + bytes([number])

        body = data[footer:-8]
        assert varint(value) in body
        body = body.replace(varint(value), varint(value + by), 1)
        path.write_bytes(data[:footer] + body + len(body).to_bytes(4, "little") + b"PAR1")

    return harm


@pytest.mark.parametrize("what", ["data_page_offset", "total_compressed_size"])
@pytest.mark.parametrize("by", [1_000, 1_000_000, 2**40])
def test_damaged_offsets_are_no_absent_store(make_job: MakeJob, corpus: Path, what: str, by: int) -> None:
    texts = [f"text {n}" for n in range(50)]
    write_texts(corpus / "c.parquet", texts, use_dictionary=False, compression="none")
    shift(what, by)(corpus / "c.parquet")
    through(make_job, corpus, shard_rows=10)


def test_names_of_columns_that_are_not_utf8(make_job: MakeJob, corpus: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "caff": [1]}), corpus / "c.parquet", store_schema=False)
    written = (corpus / "c.parquet").read_bytes()
    (corpus / "c.parquet").write_bytes(written.replace(b"caff", b"caf\xe9"))
    *_, odd = plan_shards(at(corpus), shard_rows=2, check=prompt_of(make_job()).check).files
    assert odd.unreadable
    through(make_job, corpus)


def test_values_that_a_dictionary_holds_once_are_counted_as_they_are_decoded(tmp_path: Path) -> None:
    """200 MB of rows in a file of some hundred KB."""
    pq.write_table(pa.table({"text": [f"{n % 2}" + "x" * 50_000 for n in range(4000)]}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 500_000
    whole = plan_shards(at(tmp_path), shard_rows=256, check=lambda schema, where: None)
    held = 0
    before = pa.total_allocated_bytes()
    for number, block in enumerate(map(pack, read_shards(whole.folder, list(whole.shards())))):
        held = max(held, pa.total_allocated_bytes() - before)
        assert block.nbytes < 14_000_000, number
    assert number == 15
    # A shard, its packed copy, and a batch.
    assert held < 60_000_000


def test_large_cells_make_small_shards_though_a_dictionary_holds_them(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x" * 5_000_000] * 100, "n": [1] * 100}), tmp_path / "a.parquet")
    whole = plan_shards(at(tmp_path), shard_rows=256, check=lambda schema, where: None)
    assert (tmp_path / "a.parquet").stat().st_size < 1_000_000
    assert [shard.rows for shard in whole.shards()] == [53, 47]
    plain = plan_shards(at(tmp_path), shard_rows=50, check=lambda schema, where: None)
    assert [shard.rows for shard in plain.shards()] == [50, 50]


def test_large_row_groups_are_read_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_groups, "BATCH_BYTES", 1 << 20)
    texts = [f"{n}" + "y" * 9_000 for n in range(3000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    whole = plan_shards(at(tmp_path), shard_rows=256, check=lambda schema, where: None)
    held = {}
    for fetched in (1 << 20, 1 << 30):
        monkeypatch.setattr(row_groups, "FETCHED_BYTES", fetched)
        before, held[fetched], found = pa.total_allocated_bytes(), 0, []
        for table in read_shards(whole.folder, list(whole.shards())):
            held[fetched] = max(held[fetched], pa.total_allocated_bytes() - before)
            found += table.column("text").to_pylist()
        assert found == texts
    # Of 27 MB that a row group has.
    assert held[1 << 20] < 18_000_000
    assert held[1 << 30] > 27_000_000
