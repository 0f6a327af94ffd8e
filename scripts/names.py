"""Public classes and functions of hycluster that have one name in two modules; exit 1 if there is one.

    python scripts/names.py

A name in two modules is a trap for whoever reads one and has the other in mind. ``SAME`` are those that mean the same
wherever they are.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# By name, why it may be there more than once.
SAME = {
    "main": "a module that is started",
    "patch": "puts a change of vLLM's or Ray's behaviour into this process",
    "install": "puts a change of vLLM's or Ray's behaviour into this process",
    "upgrade": "the command, and what alembic calls of each of its steps",
    "apply": "puts a change of vLLM's or Ray's behaviour into this process",
}


def public(path: Path) -> Iterator[tuple[str, int]]:
    """Classes and functions at the top of a module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node.name, node.lineno


def twice(package: Path) -> dict[str, list[str]]:
    """By name, the places where it is defined."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted(package.rglob("*.py")):
        if "_pb2" not in path.name:
            for name, line in public(path):
                places[name].append(f"{path.relative_to(package.parent)}:{line}")
    return {name: found for name, found in sorted(places.items()) if len(found) > 1 and name not in SAME}


def main() -> int:
    found = twice(ROOT / "hycluster")
    for name, places in found.items():
        print(f"{name}: {', '.join(places)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
