"""docs/walk.md sends newcomers to files and names that are there: ten stops each way, and where to look for what."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STOP = re.compile(r"^\| (\d+) \| `([^`]+)` \|.*\| ([^|]+) \|$", re.MULTILINE)
*WALKS, QUESTIONS = (ROOT / "docs/walk.md").read_text().split("\n## ")[1:]


@pytest.mark.parametrize("walk", WALKS, ids=[walk.split("\n")[0] for walk in WALKS])
def test_every_stop_is_there(walk: str) -> None:
    stops = STOP.findall(walk)
    assert [int(number) for number, _, _ in stops] == list(range(1, len(stops) + 1))
    assert 5 <= len(stops) <= 10
    for _, file, names in stops:
        defined = _defined(ast.parse((ROOT / file).read_text()))
        assert set(re.findall(r"`([\w.]+)`", names)) <= defined, file


def test_every_answer_is_there() -> None:
    rows = [line for line in QUESTIONS.splitlines() if "? |" in line]
    assert len(rows) >= 3
    for row in rows:
        files = [ROOT / file for file in re.findall(r"`(hycluster/[\w/]+\.py)`", row)]
        defined = {name for file in files for name in _defined(ast.parse(file.read_text()))}
        assert set(re.findall(r"`(\w+(?:\.\w+)?)`", row)) <= defined, row


def _defined(tree: ast.AST, prefix: str = "") -> set[str]:
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found |= {prefix + node.name} | _defined(node, f"{prefix}{node.name}.")
    return found
