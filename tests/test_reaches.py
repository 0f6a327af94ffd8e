"""``docs/reaches.md`` lists all that hycluster uses of others' internals, and nothing else."""

from __future__ import annotations

import importlib
import re
import types
from pathlib import Path

import pytest

from tests.reaches import PUBLIC_RAY, ROOT, defined, imports, reaches, rows, sources

PATCHES = "hycluster/engine/patches/"


def test_every_reach_is_listed() -> None:
    listed = rows()
    for path, reached in reaches().items():
        assert path in listed, f"docs/reaches.md has no row for {path}, which reaches {sorted(reached)}"
        unlisted = listed[path].unlisted(reached)
        assert not unlisted, f"docs/reaches.md: {path} reaches {sorted(unlisted)} as well"


def test_what_is_listed_is_reached() -> None:
    reached = reaches()
    for path, row in rows().items():
        assert path in sources(), f"docs/reaches.md lists {path}, which there is not"
        idle = row.idle(reached.get(path, set()))
        assert not idle, f"docs/reaches.md: {path} reaches no {sorted(idle)}"


def test_every_row_names_tests_that_there_are() -> None:
    for path, row in rows().items():
        assert row.tests, f"docs/reaches.md: {path} is watched by no test"
        for test in row.tests:
            assert defined(test), f"docs/reaches.md: {path} is to be watched by {test}, which there is not"


def test_every_patch_is_listed_with_its_upstream() -> None:
    listed = {path: row for path, row in rows().items() if path.startswith(PATCHES)}
    files = {path for path in sources() if path.startswith(PATCHES)}
    assert listed.keys() == files - {f"{PATCHES}__init__.py", f"{PATCHES}pinned.py"}
    for path, row in listed.items():
        said = (ROOT / path).read_text().partition("\nUpstream: ")[2].partition("\nVersion: ")[0]
        upstream = row.cells[2]
        issue = re.compile(r"[\w.-]+/[\w.-]+#\d+")
        assert set(issue.findall(said)) == set(issue.findall(upstream)), path
        assert ("none" in said) == ("none" in upstream), path
        assert Path(row.tests[0]) == Path("tests/engine/patches") / f"test_{Path(path).name}"


def test_what_is_taken_for_public_is_marked_so_by_ray() -> None:
    taken = {
        (module, name)
        for tree in sources().values()
        for module, name in imports(tree)
        if module in PUBLIC_RAY and name is not None
    }
    for module, name in sorted(taken):
        found = getattr(importlib.import_module(module), name, None) or importlib.import_module(f"{module}.{name}")
        marked = isinstance(found, types.ModuleType) or hasattr(found, "_annotated")
        assert marked, f"{module}.{name} is not public; see tests/reaches.py"


@pytest.mark.parametrize("test", ["tests/none.py", "tests/test_reaches.py::test_none", "tests/test_cluster.py::A::b"])
def test_a_test_that_is_not_there_is_seen(test: str) -> None:
    assert not defined(test)
