import json
from pathlib import Path
from typing import Any

import demo
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demo_process import DemoFailed


@pytest.mark.parametrize(("rest", "ray"), [("", None), (" ray 127.0.0.1:6379", "127.0.0.1:6379")])
def test_addresses_come_from_the_ready_line(rest: str, ray: str | None) -> None:
    line = f"ready http://127.0.0.1:41234 grpc 127.0.0.1:41235{rest} models m after 61 s"
    assert demo.addresses(line) == ("http://127.0.0.1:41234", "127.0.0.1:41235", ray)


@pytest.mark.parametrize("line", [None, "ready", "ready http://127.0.0.1:1"])
def test_a_ready_line_without_addresses_fails_the_demo(line: str | None) -> None:
    with pytest.raises(DemoFailed, match="no addresses"):
        demo.addresses(line)


TEXTS = pa.table({"name": ["a", "b", "c"], "text": ["A.", "B.", "C."]})


def summaries(folder: Path, rows: list[tuple[str, str]], quarantined: int = 0) -> Path:
    folder.mkdir()
    parts: list[dict[str, Any] | None] = []
    for number, (name, output) in enumerate(rows):
        path = f"part-{number}.parquet"
        row = {"name": name, "output": output, "finish_reason": "stop", "prompt_tokens": 9, "completion_tokens": 4}
        pq.write_table(pa.Table.from_pylist([row]), folder / path)
        parts.append({"path": path, "rows": 1})
    shards = [{"part": part, "quarantine": None} for part in parts]
    if quarantined:
        shards.append({"part": None, "quarantine": {"path": "_quarantine/q.parquet", "rows": quarantined}})
    # Written by an attempt that did not count.
    pq.write_table(pa.table({"name": ["a"], "output": ["twice"]}), folder / "part-lost.parquet")
    (folder / "_manifest.json").write_text(json.dumps({"shards": shards}))
    (folder / "_SUCCESS").touch()
    return folder


def test_one_summary_a_text_passes(tmp_path: Path) -> None:
    output = summaries(tmp_path / "out", [("b", "2"), ("a", "1"), ("c", "3")])
    assert {name: row["output"] for name, row in demo.check(TEXTS, output).items()} == {"a": "1", "b": "2", "c": "3"}


@pytest.mark.parametrize("name", ["_manifest.json", "_SUCCESS"])
def test_an_output_that_is_not_committed_fails_the_demo(name: str, tmp_path: Path) -> None:
    output = summaries(tmp_path / "out", [("a", "1"), ("b", "2"), ("c", "3")])
    (output / name).unlink()
    with pytest.raises(DemoFailed, match=name):
        demo.check(TEXTS, output)


@pytest.mark.parametrize(
    ("rows", "quarantined", "said"),
    [
        ([("a", "1"), ("b", "2")], 0, "3 texts went in, 2 came out"),
        ([("a", "1"), ("b", "2"), ("b", "2"), ("c", "3")], 0, "4 came out \\(3 of them distinct\\)"),
        ([("a", "1"), ("b", " \n"), ("c", "3")], 0, "the summaries of b are empty"),
        ([("a", "1"), ("b", "2")], 1, "1 rows were quarantined"),
    ],
)
def test_a_wrong_output_fails_the_demo(
    rows: list[tuple[str, str]], quarantined: int, said: str, tmp_path: Path
) -> None:
    with pytest.raises(DemoFailed, match=said):
        demo.check(TEXTS, summaries(tmp_path / "out", rows, quarantined))


def test_the_table_shows_the_summaries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = demo.check(TEXTS, summaries(tmp_path / "out", [("a", "First [b]words[/b]"), ("b", "2"), ("c", "3")]))
    demo.show_results(TEXTS, results, seconds=2.0)
    shown = capsys.readouterr().out
    assert "First [b]words[/b]" in shown
    assert "27 tokens in, 12 out, 6.0 tokens/s" in shown
