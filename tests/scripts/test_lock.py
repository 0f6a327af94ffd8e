"""What is installed has all that it asks for, and the locks have all that the project's files import."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
FOLDERS = ("hycluster", "tests", "bench", "scripts")
CLIENTS = ROOT / "tests/clients"
# What runs in the environment that scripts/clients.sh makes, but for those whose clients are in this one, too.
APART = {*(CLIENTS / "python").glob("*.py")} - {CLIENTS / f"python/{name}.py" for name in ("openai", "anthropic")}


def locked(*locks: str) -> set[NormalizedName]:
    """Names of the packages in the locks."""
    return {
        canonicalize_name(name)
        for lock in locks
        for name in re.findall(r"^([a-z0-9][a-z0-9.-]*)==", (REQUIREMENTS / lock).read_text(), re.MULTILINE)
    }


def imported(file: Path) -> Iterator[str]:
    """First parts of the names of the modules that a file imports, anywhere in it, but from its own package."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


HERE = locked("cpu.lock", "dev.lock", "torch-cpu.txt")


def test_nothing_is_missing_that_was_not_left_out() -> None:
    left_out = {
        canonicalize_name(line)
        for file in REQUIREMENTS.glob("left-out*.txt")
        for line in file.read_text().splitlines()
        if re.match(r"[a-z]", line)
    }
    found = {canonicalize_name(one.metadata["Name"]): one for one in distributions()}
    missing = {
        f"{name} asks for {requirement.name}"
        for name in HERE & found.keys()
        for requirement in map(Requirement, found[name].requires or [])
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if canonicalize_name(requirement.name) not in found.keys() | left_out
    }
    assert missing == set()


def strangers(files: Iterable[Path], packages: Mapping[str, Sequence[str]], have: set[NormalizedName]) -> set[str]:
    """What the files import, and no package of a lock brings.

    Args:
        packages: by module, those that bring it, of what is installed.
    """
    own = {*FOLDERS, *(script.stem for script in (ROOT / "scripts").glob("*.py"))}
    return {
        f"{file.relative_to(ROOT)} imports {module}"
        for file in files
        for module in imported(file)
        if module not in sys.stdlib_module_names and module not in own
        if have.isdisjoint(map(canonicalize_name, packages.get(module, ())))
    }


def test_nothing_is_imported_that_the_locks_do_not_have() -> None:
    """A package that somebody once installed by hand is missing on a fresh machine."""
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py") if file not in APART]
    assert strangers(files, packages_distributions(), HERE) == set()


def test_clients_import_what_their_own_lock_has() -> None:
    folder = next(ROOT.glob(".venv-clients/lib/python*/site-packages"), None)
    if folder is None:
        pytest.skip("their packages are not there: make clients")
    packages: dict[str, list[str]] = {}
    for one in distributions(path=[str(folder)]):
        for module in {file.parts[0].partition(".")[0] for file in one.files or () if file.suffix in (".py", ".so")}:
            packages.setdefault(module, []).append(one.metadata["Name"])
    assert len(APART) > 3
    assert strangers(APART, packages, locked("clients.lock")) == set()


def test_clients_for_node_import_what_their_lock_has() -> None:
    asked = json.loads((CLIENTS / "node/package.json").read_text())["dependencies"]
    lock = json.loads((CLIENTS / "node/package-lock.json").read_text())
    text = "".join(file.read_text() for file in (CLIENTS / "node").glob("*.mjs"))
    modules = re.findall(r'from "((?:@[\w-]+/)?[\w-]+)(?:/[\w/-]+)?"', text)
    assert {*modules} == {*asked}
    assert lock["packages"].pop("")["dependencies"] == asked
    # Whoever installs them asks a registry of his own, and gets the same.
    assert [name for name, each in lock["packages"].items() if "resolved" in each or "integrity" not in each] == []
