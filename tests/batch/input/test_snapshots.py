"""Tables written by their own libraries, with deletes, through a job and its proof."""

from __future__ import annotations

import base64
import json
import re
import shutil
import string
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog.memory import InMemoryCatalog

from hycluster.batch.input.corpus import ShardPlan, plan_shards
from hycluster.batch.job import Job
from hycluster.batch.output.verify import verify_output
from hycluster.errors import SettingsError
from hycluster.storage import Folder, locate
from tests.batch.committed import commit_all, parts
from tests.batch.conftest import MakeJob
from tests.located import at
from tests.object_store import ObjectStore

TEXTS = pa.table({"text": ["a", "b", "c"], "country": ["de", "de", "fr é"]})
MORE = pa.table({"text": ["d"], "country": ["de"]})


def write_delta(uri: str, options: dict[str, str] | None = None) -> None:
    """Version 0 has a, b, c; 1 has d too; 2 has lost a."""
    deltalake.write_deltalake(uri, TEXTS, partition_by=["country"], storage_options=options)
    deltalake.write_deltalake(uri, MORE, mode="append", storage_options=options)
    deltalake.DeltaTable(uri, storage_options=options).delete("text = 'a'")


def write_iceberg(folder: Path) -> list[int]:
    """The same; the ids of its snapshots."""
    catalog = InMemoryCatalog("test", warehouse=str(folder))
    catalog.create_namespace("n")
    table = catalog.create_table("n.t", schema=TEXTS.schema, location=str(folder / "t"))
    table.append(TEXTS)
    table.append(MORE)
    table.delete("text = 'a'")
    return [snapshot.snapshot_id for snapshot in table.metadata.snapshots]


def planned(place: Folder, snapshot: int | None = None) -> ShardPlan:
    return plan_shards(place, shard_rows=2, check=lambda schema, where: None, snapshot=snapshot)


def come_out(job: Job) -> list[tuple[str, str]]:
    out = commit_all(job)
    assert verify_output(at(out), at(job.input.path)).faults == []
    rows = [row for path in parts(out) for row in pq.read_table(path).to_pylist()]
    assert all(row["output"] == row["text"].upper() for row in rows)
    shutil.rmtree(out)
    return sorted((row["text"], row["country"]) for row in rows)


# The digits of Python's base 85 and of ZeroMQ's, which the log uses.
B85 = string.digits + string.ascii_uppercase + string.ascii_lowercase + "!#$%&()*+-;<=>?@^_`{|}~"
Z85 = string.digits + string.ascii_lowercase + string.ascii_uppercase + ".-:+=^!/*?&<>()[]{}@%$#"
LEFT = [("b", "de"), ("c", "fr é"), ("d", "de")]
FIRST = [("a", "de"), ("b", "de"), ("c", "fr é")]


def of(folder: Path, **more: Any) -> dict[str, Any]:
    return {"path": str(folder), "columns": {"text": "text"}, **more}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Delta Lake", "Apache Iceberg"])
def test_a_table_is_read_at_a_snapshot(make_job: MakeJob, tmp_path: Path, kind: str) -> None:
    if kind == "Delta Lake":
        write_delta(str(tmp_path / "t"))
        ids = [0, 1, 2]
    else:
        ids = write_iceberg(tmp_path)
    table = tmp_path / "t"
    assert come_out(make_job(input=of(table))) == LEFT
    assert come_out(make_job(input=of(table, snapshot=ids[0]))) == FIRST
    latest = planned(at(table))
    assert latest.snapshot == ids[-1]
    assert [re.sub("'.*?'", "", line) for line in latest.left_out] == [
        f"1 file, : no part of snapshot {ids[-1]} of , a table of {kind}"
    ]
    with pytest.raises(SettingsError, match=r"input\.snapshot:? 77"):
        planned(at(table), 77)


@pytest.mark.filterwarnings("ignore")
def test_a_table_that_has_moved_on_is_another_input_and_its_earlier_output_still_proves(
    make_job: MakeJob, tmp_path: Path
) -> None:
    write_delta(str(tmp_path / "t"))
    job = make_job(input=of(tmp_path / "t"))
    out = commit_all(job)
    import deltalake

    deltalake.write_deltalake(str(tmp_path / "t"), MORE, mode="append")
    with pytest.raises(SettingsError, match=r"input.snapshot: was 2, is 3"):
        commit_all(job)
    assert verify_output(at(out), at(tmp_path / "t")).faults == []
    assert json.loads((out / "_job.json").read_text())["input"]["snapshot"] == 2


def test_a_table_on_an_object_store(store: ObjectStore, make_job: MakeJob) -> None:
    place = locate(store.uri("delta"), "input.path")
    write_delta(*place.object_store())
    assert (planned(place).rows, planned(place, 0).rows) == (3, 3)


def delete_files(table: Path) -> None:
    for path in table.rglob("*.parquet"):
        path.unlink()


def map_columns(table: Path) -> None:
    log = table / "_delta_log" / "00000000000000000000.json"
    log.write_text(log.read_text().replace('"configuration":{}', '"configuration":{"delta.columnMapping.mode":"name"}'))


def mark_rows(table: Path) -> None:
    """A deletion vector within the log, of the first two rows, made by hand: deltalake writes none."""
    import pyroaring

    vector = struct.pack("<iQI", 1681511377, 1, 0) + pyroaring.BitMap([0, 1]).serialize()
    log, *later = sorted((table / "_delta_log").glob("*.json"))
    for path in later:
        path.unlink()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    features = ["deletionVectors"]
    for line in lines:
        if "protocol" in line:
            line["protocol"] = {
                "minReaderVersion": 3,
                "minWriterVersion": 7,
                "readerFeatures": features,
                "writerFeatures": features,
            }
        if "add" in line and json.loads(line["add"]["stats"])["numRecords"] == 2:
            line["add"]["deletionVector"] = {
                "storageType": "i",
                "pathOrInlineDv": base64.b85encode(vector).decode().translate(str.maketrans(B85, Z85)),
                "sizeInBytes": len(vector),
                "cardinality": 2,
            }
    log.write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (mark_rows, "marks rows of its files as deleted"),
        (delete_files, r"of whose snapshot 2 there is no '.*' any more"),
        (map_columns, "column mapping"),
        (lambda table: (table / "_delta_log" / "00000000000000000001.json").write_text("{"), "that can't be read: "),
    ],
)
def test_a_table_that_its_files_do_not_tell_is_refused(tmp_path: Path, harm: Callable[[Path], Any], said: str) -> None:
    write_delta(str(tmp_path / "t"))
    harm(tmp_path / "t")
    with pytest.raises(SettingsError, match=rf"^input.path: .* a table of Delta Lake.*{said}"):
        planned(at(tmp_path / "t"))


@pytest.mark.filterwarnings("ignore")
def test_an_iceberg_table_whose_columns_were_renamed_is_refused(tmp_path: Path) -> None:
    write_iceberg(tmp_path)
    from pyiceberg.table import StaticTable

    (newest,) = (tmp_path / "t" / "metadata").glob("00003-*")
    assert StaticTable.from_metadata(str(newest)).metadata.schemas
    data = json.loads(newest.read_text())
    renamed = json.loads(json.dumps(data["schemas"][0]))
    renamed["schema-id"] = 1
    renamed["fields"][1]["name"] = "land"
    data["schemas"].append(renamed)
    newest.write_text(json.dumps(data))
    with pytest.raises(SettingsError, match="whose column 'land' has had another name or meaning"):
        planned(at(tmp_path / "t"))


@pytest.mark.parametrize(
    ("log", "package"),
    [("_delta_log/00000000000000000000.json", "deltalake"), ("metadata/v2.metadata.json", "pyiceberg")],
)
def test_without_its_library_a_table_is_refused_with_what_to_install(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, log: str, package: str
) -> None:
    (corpus / log).parent.mkdir()
    (corpus / log).write_text("{}")
    for name in ("pyiceberg.catalog.noop", "deltalake"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SettingsError, match=rf"which needs '{package}.*pip install 'hycluster\[tables\]'"):
        planned(at(corpus))


def test_a_snapshot_of_what_is_no_table_is_refused(corpus: Path) -> None:
    with pytest.raises(SettingsError, match=r"^input.snapshot: 3: .* is no table of Delta Lake or Apache Iceberg"):
        planned(at(corpus), 3)
    with pytest.raises(SettingsError, match=r"^input.snapshot: 3: .* is no folder"):
        planned(at(corpus / "b.parquet"), 3)
