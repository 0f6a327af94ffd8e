import json
import re
import stat
import time
from pathlib import Path
from typing import Any

import demo
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demo_corpus import MAX_CHARS, MIN_CHARS, plain, write_corpus


def ignore(detail: str) -> None:
    pass


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell script that stands in for ``hycluster``: its arguments are the program it runs."""
    path = tmp_path / "hycluster"
    path.write_text('#!/bin/sh\neval "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(demo, "HYCLUSTER", str(path))
    return path


def test_the_corpus_is_at_least_40_real_texts_in_several_files(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path, 48)
    assert texts.num_rows >= 40
    assert len(set(texts["name"].to_pylist())) == texts.num_rows
    lengths = [len(text) for text in texts["text"].to_pylist()]
    assert min(lengths) >= MIN_CHARS
    assert max(lengths) <= MAX_CHARS
    assert len({length // 100 for length in lengths}) > 5
    files = sorted(tmp_path.glob("*.parquet"))
    assert len(files) == 3
    assert pa.concat_tables([pq.read_table(file) for file in files]) == texts


def test_the_corpus_is_always_the_same(tmp_path: Path) -> None:
    assert write_corpus(tmp_path / "a", 12) == write_corpus(tmp_path / "b", 12)


def test_markdown_becomes_its_paragraphs() -> None:
    description = """# Title

[![badge](https://x/y.svg)](https://x)

**Thing** does the `work` of [several](https://x) other things, and it does
so in plain sight of everyone who looks.

| a | b |
|---|---|
| a table that is long enough to be taken for a paragraph of text, but none. | x |

- an item of a list that is long enough to be taken for a paragraph of text, but none.

```python
print("a line of code that is long enough to be taken for a paragraph of text, but none.")
```

Too short.
"""
    sentence = "Thing does the work of several other things, and it does so in plain sight of everyone who looks."
    assert plain(description) == sentence


def test_restructured_text_becomes_its_paragraphs() -> None:
    description = """Title
=====

.. image:: https://x/y.svg
   :alt: a badge that says something long enough to be taken for a paragraph, but none.

The ``thing`` implements `the protocol <https://x/y>`_ on top of Trio_, and calls :class:`Thing` wherever it can.
"""
    assert plain(description) == ("The thing implements the protocol on top of Trio, and calls Thing wherever it can.")


def test_a_long_text_ends_with_a_sentence() -> None:
    text = plain("This is a sentence that says just about nothing at all, again and again. " * 100)
    assert MAX_CHARS - 100 < len(text) <= MAX_CHARS
    assert text.endswith("again.")


def test_addresses_come_from_the_ready_line() -> None:
    line = "ready http://127.0.0.1:41234 grpc 127.0.0.1:41235 models m after 61 s"
    assert demo.addresses(line) == ("http://127.0.0.1:41234", "127.0.0.1:41235")


@pytest.mark.parametrize("line", [None, "ready", "ready http://127.0.0.1:1"])
def test_a_ready_line_without_addresses_fails_the_demo(line: str | None) -> None:
    with pytest.raises(demo.DemoFailed, match="no addresses"):
        demo.addresses(line)


def test_a_process_is_waited_for_by_its_lines(command: Path, tmp_path: Path) -> None:
    process = demo.Process(["echo one; echo ready two; sleep 60"], tmp_path / "log")
    seen: list[str] = []
    try:
        assert process.wait_for(lambda line: line.startswith("ready"), 30, seen.append) == "ready two"
        assert seen == ["one"]
        assert process.running()
    finally:
        process.stop()
    assert not process.running()
    assert (tmp_path / "log").read_text() == "one\nready two\n"


def test_a_process_that_ends_well_has_no_line_to_wait_for(command: Path, tmp_path: Path) -> None:
    process = demo.Process(["echo one"], tmp_path / "log")
    assert process.wait_for(lambda line: line == "two", 30, ignore) is None
    assert process.stop()


def test_a_process_that_fails_is_told_with_its_last_words(command: Path, tmp_path: Path) -> None:
    process = demo.Process(["echo port 8000 is in use; exit 3"], tmp_path / "log")
    with pytest.raises(
        demo.DemoFailed, match=re.compile("exit code 3; its log is .*log.*port 8000 is in use", re.DOTALL)
    ):
        process.wait(30, ignore)


def test_a_process_that_takes_too_long_fails_the_demo(command: Path, tmp_path: Path) -> None:
    process = demo.Process(["sleep 60"], tmp_path / "log")
    try:
        with pytest.raises(demo.DemoFailed, match="not done after 0 s"):
            process.wait(0.3, ignore)
    finally:
        process.stop()


def test_a_process_that_does_not_listen_is_killed(
    command: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "STOP_TIMEOUT_S", 0.3)
    process = demo.Process(["trap '' TERM; echo up; while true; do sleep 0.1; done"], tmp_path / "log")
    process.wait_for(lambda line: line == "up", 30, ignore)
    begun = time.monotonic()
    assert not process.stop()
    assert time.monotonic() - begun < 5
    assert not process.running()


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
        shards.append({"part": None, "quarantine": {"path": "quarantine/q.parquet", "rows": quarantined}})
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
    with pytest.raises(demo.DemoFailed, match=name):
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
    with pytest.raises(demo.DemoFailed, match=said):
        demo.check(TEXTS, summaries(tmp_path / "out", rows, quarantined))


def test_the_table_shows_the_summaries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = demo.check(TEXTS, summaries(tmp_path / "out", [("a", "First [b]words[/b]"), ("b", "2"), ("c", "3")]))
    demo.show_results(TEXTS, results, seconds=2.0)
    shown = capsys.readouterr().out
    assert "First [b]words[/b]" in shown
    assert "27 tokens in, 12 out, 6.0 tokens/s" in shown
