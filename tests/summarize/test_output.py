from __future__ import annotations

import json
from pathlib import Path

import pytest

from hycluster.batch.summaries.tree import Node, Tree
from hycluster.errors import SettingsError
from hycluster.summarize.output import Summarized, open_output

TREE = Tree(
    (
        Node(0, 0, 0, 5, 0, (), "one", "stop", 10, 1),
        Node(0, 1, 5, 9, 5, (), "two", "stop", 11, 1),
        Node(1, 0, 0, 9, None, (0, 1), " both 长 \n", "length", 12, 2),
    )
)
GOOD = Summarized(("a.txt",), "m", 9, 1.23456, TREE)
BAD = Summarized(("b.txt",), "m", 0, 0, error="is empty")
TOGETHER = Summarized(("a.txt", "b.txt"), "m", 9, 1, TREE)


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    with open_output(None, as_json=False, headings=False, keep_tree=False) as out:
        out.write(GOOD)
        out.write(BAD)
    assert capsys.readouterr().out == "both 长\n"
    with open_output(None, as_json=False, headings=True, keep_tree=False) as out:
        out.write(GOOD)
        out.write(BAD)
        out.write(TOGETHER)
    assert capsys.readouterr().out == "==> a.txt <==\nboth 长\n\n==> a.txt, b.txt <==\nboth 长\n\n"


def test_json_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("what an earlier run left\n")
    with open_output(path, as_json=True, headings=True, keep_tree=False) as out:
        assert path.read_text() == "what an earlier run left\n"
        for document in (GOOD, BAD, TOGETHER):
            out.write(document)
    assert capsys.readouterr().out == path.read_text()
    good, bad, together = map(json.loads, path.read_text().splitlines())
    assert good == {
        "file": "a.txt",
        "summary": " both 长 \n",
        "finish_reason": "length",
        "model": "m",
        "characters": 9,
        "parts": 2,
        "merge_levels": 1,
        "prompt_tokens": 33,
        "completion_tokens": 4,
        "seconds": 1.235,
    }
    assert bad == {"file": "b.txt", "error": "is empty"}
    assert together["files"] == ["a.txt", "b.txt"]


def test_the_tree_is_kept_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with open_output(None, as_json=True, headings=False, keep_tree=True) as out:
        out.write(GOOD)
    nodes = json.loads(capsys.readouterr().out)["tree"]["nodes"]
    assert [(node["level"], node["start"], node["end"], node["children"]) for node in nodes] == [
        (0, 0, 5, []),
        (0, 5, 9, []),
        (1, 0, 9, [0, 1]),
    ]


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(SettingsError, match=r"--output: .* can't be written: No such file or directory"),
        open_output(tmp_path / "none" / "out", as_json=False, headings=False, keep_tree=False),
    ):
        pass
