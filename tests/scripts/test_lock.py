"""What is installed has all that it asks for, and the locks have all that the project's files import."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
FOLDERS = ("hycluster", "tests", "bench", "scripts")


def locked() -> set[NormalizedName]:
    """Names of the packages in the locks that `make setup` installs."""
    return {
        canonicalize_name(name)
        for lock in ("cpu.lock", "dev.lock", "torch-cpu.txt")
        for name in re.findall(r"^([a-z0-9][a-z0-9.-]*)==", (REQUIREMENTS / lock).read_text(), re.MULTILINE)
    }


def imported(file: Path) -> Iterator[str]:
    """First parts of the names of the modules that a file imports, anywhere in it, but from its own package."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


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
        for name in locked() & found.keys()
        for requirement in map(Requirement, found[name].requires or [])
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if canonicalize_name(requirement.name) not in found.keys() | left_out
    }
    assert missing == set()


def test_nothing_is_imported_that_the_locks_do_not_have() -> None:
    """A package that somebody once installed by hand is missing on a fresh machine."""
    packages = packages_distributions()
    have = locked()
    own = {*FOLDERS, *(script.stem for script in (ROOT / "scripts").glob("*.py"))}
    strangers = {
        f"{file.relative_to(ROOT)} imports {module}"
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.py")
        for module in imported(file)
        if module not in sys.stdlib_module_names and module not in own
        if have.isdisjoint(map(canonicalize_name, packages.get(module, ())))
    }
    assert strangers == set()
