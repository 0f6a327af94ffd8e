"""Which files an input is, where their names and the ways to them are odd."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from hycluster.batch.input.corpus import ShardPlan, plan_shards
from hycluster.batch.input.listing import list_files
from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.verify import verify_output
from hycluster.batch.prompts import prompt_of
from hycluster.errors import SettingsError
from hycluster.storage import locate
from tests.batch.committed import commit_all, parts
from tests.batch.conftest import MakeJob, write_texts
from tests.located import at
from tests.object_store import ObjectStore


def planned(path: Path) -> ShardPlan:
    return plan_shards(at(path), shard_rows=2, check=lambda schema, where: None)


def in_latin_1(folder: Path, name: str) -> bytes:
    return os.fsencode(folder) + b"/" + name.encode("latin-1")


def test_a_name_that_is_not_utf8_is_nobodys_business_but_its_own(corpus: Path) -> None:
    Path(os.fsdecode(in_latin_1(corpus, "café.txt"))).write_text("a menu")
    assert [file.path for file in planned(corpus).files] == ["a/z.parquet", "b.parquet"]
    os.rename(corpus / "b.parquet", in_latin_1(corpus, "café.parquet"))
    _, odd = planned(corpus).files
    assert odd.path == "caf\\xe9.parquet"
    assert odd.fault is not None
    assert odd.fault.error_message.endswith("caf\\xe9.parquet: its name is not UTF-8; rename it")


def test_a_path_that_is_not_utf8_is_named(corpus: Path) -> None:
    with pytest.raises(SettingsError, match=r"^input.path: '.*caf\\udce9' can't be read: "):
        planned(Path(os.fsdecode(in_latin_1(corpus, "café"))))


def test_links_that_lead_round_in_circles_are_followed_once(corpus: Path) -> None:
    (corpus / "a" / "up").symlink_to(corpus)
    (corpus / "itself").symlink_to(corpus / "itself")
    (corpus / "nowhere.parquet").symlink_to("gone")
    assert [file.path for file in planned(corpus).files] == ["a/z.parquet", "b.parquet"]


def test_a_link_to_another_folder_is_followed(corpus: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "more" / "x.parquet", ["more"])
    (corpus / "more").symlink_to(tmp_path / "more")
    assert [file.path for file in planned(corpus).files] == ["a/z.parquet", "b.parquet", "more/x.parquet"]


def test_an_output_inside_the_input_is_noticed_whatever_the_way_there(corpus: Path, tmp_path: Path) -> None:
    whole = planned(corpus)
    (tmp_path / "link").symlink_to(corpus)
    for way in (corpus / ".." / corpus.name / "out", tmp_path / "link" / "out", tmp_path / "x" / ".." / "link" / "out"):
        assert OutputFolder(at(way)).is_input(whole), way
    through_a_link = planned(tmp_path / "link")
    assert OutputFolder(at(corpus / "out")).is_input(through_a_link)
    out = tmp_path / "elsewhere"
    write_texts(out / "part-1.parquet", ["an earlier run"])
    assert not OutputFolder(at(out)).is_input(whole)
    (corpus / "in").symlink_to(out)
    assert OutputFolder(at(out)).is_input(planned(corpus))


def test_an_empty_name_in_a_uri_is_named() -> None:
    with pytest.raises(SettingsError, match=r"^input.path: 's3://b/a//b.*' has an empty name between two slashes"):
        locate("s3://b/a//b?region=eu-west-1", "input.path")


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        """Stands for a file system of another library: its errors are its own."""

        type_name = "py::fsspec+hf"

        def get_file_info(self, path: str) -> pafs.FileInfo:
            raise RuntimeError("no such host")

    opened = SimpleNamespace(from_uri=lambda uri: (Away(), "datasets/a/b"))
    monkeypatch.setattr(sys.modules["hycluster.storage.locate"], "pafs", SimpleNamespace(FileSystem=opened))
    with pytest.raises(SettingsError, match=r"^input.path: 'hf://datasets/a/b' can't be read: no such host"):
        list_files(locate("hf://datasets/a/b", "input.path"))


def test_odd_keys_of_an_object_store(store: ObjectStore) -> None:
    folder = locate(store.uri("odd"), "input.path")
    names = ["a b.parquet", "100%.parquet", "a#b?.parquet", "文.parquet", "+.parquet", "a=1&b.parquet"]
    data = b"PAR1"
    for name in names:
        folder.writable().write(name, data)
    assert sorted(list_files(folder).sizes) == sorted(names)
    for name in names:
        with folder.open_file(name) as handle:
            assert handle.read() == data


def test_what_is_left_out_is_told(corpus: Path) -> None:
    for name in ("x.PARQUET", "20240101_000000_00001_abcde", "y.parq", "notes.txt"):
        (corpus / name).write_bytes(b"")
    write_texts(corpus / "_tmp" / "x.parquet", ["hidden"])
    (corpus / "_SUCCESS").touch()
    (corpus / ".part-0.parquet.crc").touch()
    assert planned(corpus).left_out == (
        "1 file, '_tmp/x.parquet': names and folders that begin with '.' or '_' are passed by",
        f"4 files, such as '20240101_000000_00001_abcde': not named *.parquet; the glob '{corpus}/**/*' takes them too",
    )
    assert planned(corpus / "*.parquet").left_out == (
        "1 file, '_tmp/x.parquet': names and folders that begin with '.' or '_' are passed by",
    )
    empty = corpus / "only-others"
    write_texts(empty / "x.PARQUET", ["a"])
    with pytest.raises(SettingsError, match=r"no \*.parquet file in this folder; 1 file, 'x.PARQUET'") as refused:
        planned(empty)
    assert refused.value.message.endswith(f": not named *.parquet; the glob '{empty}/**/*.PARQUET' takes them too")
    assert [file.path for file in planned(empty / "**" / "*.PARQUET").files] == ["x.PARQUET"]


@pytest.mark.parametrize(
    ("log", "kind"),
    [
        (".hoodie/hoodie.properties", "Apache Hudi"),
        ("a/.hoodie/hoodie.properties", "Apache Hudi"),
        ("a/_delta_log/00000000000000000000.json", "Delta Lake"),
        ("a/metadata/v2.metadata.json", "Apache Iceberg"),
        ("a/metadata/00001-5f3c2a4e-1b2c-4d5e-8f90-123456789abc.metadata.json", "Apache Iceberg"),
    ],
)
def test_a_table_of_another_kind_and_one_within_the_input_are_refused(corpus: Path, log: str, kind: str) -> None:
    path = corpus / log
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    where = "a" if log.startswith("a/") else "."
    with pytest.raises(SettingsError, match=rf"^input.path: .*: '{where}' in it is a table of {kind}"):
        planned(corpus)
    assert planned(corpus / "**" / "*.parquet").rows == 12


def test_hive_partitions_are_columns(corpus: Path, make_job: MakeJob) -> None:
    pq.write_table(pa.table({"text": ["hallo"], "year": [7]}), corpus / "x.parquet")
    for place in ("country=de/year=2024", "country=a%2Fb/year=2024", "country=__HIVE_DEFAULT_PARTITION__"):
        (corpus / place).mkdir(parents=True)
        shutil.copy(corpus / "x.parquet", corpus / place / "y.parquet")
    job = make_job(prompt="{text} {country}")
    files = plan_shards(at(corpus), shard_rows=2, check=prompt_of(job).check).files
    assert [file.partition for file in files if file.partition] == [
        (("country", None),), (("country", "a/b"),), (("country", "de"),),
    ]  # fmt: skip
    assert [bool(file.fault) for file in files] == [True, True, False, False, False, True]
    out = commit_all(make_job())
    assert verify_output(at(out), at(corpus)).faults == []
    rows = [row for path in parts(out) for row in pq.read_table(path).to_pylist() if "country" in row]
    # A column that the file has itself is the file's.
    assert [(row["country"], row["year"], row["text"]) for row in rows] == [
        (None, 7, "hallo"), ("a/b", 7, "hallo"), ("de", 7, "hallo"),
    ]  # fmt: skip
