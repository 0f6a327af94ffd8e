"""Which modules of hycluster reach into internals of other libraries, by their source; and what the docs list of it.

A reach is, in a module of hycluster:

- an import from a module of vLLM's that is none of :data:`PUBLIC_VLLM`, or of Ray's that is none of :data:`PUBLIC_RAY`
  (`tests/test_reaches.py` checks that what is taken from those is marked as public by Ray);
- an import of a name with a leading underscore, from any library;
- an attribute with a leading underscore that nobody in hycluster has, read, set, or named to `getattr` and its like;
- a method with a leading underscore in a subclass, where the file of the base class has one of that name.

What cannot be found so (wire formats, titles of processes, names of actors) is listed all the same.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "reaches.md"
# What `import vllm` offers, and the modules that define it and what goes with it.
PUBLIC_VLLM = frozenset({"vllm", "vllm.inputs", "vllm.outputs", "vllm.pooling_params", "vllm.sampling_params"})
# Those of Ray's API reference that are used here.
PUBLIC_RAY = frozenset(
    {
        "ray",
        "ray.actor",
        "ray.data",
        "ray.data.block",
        "ray.data.datasource",
        "ray.exceptions",
        "ray.serve",
        "ray.serve.config",
        "ray.serve.exceptions",
        "ray.serve.handle",
        "ray.serve.schema",
        "ray.util",
        "ray.util.placement_group",
        "ray.util.scheduling_strategies",
    }
)
# Documented with their underscore: `os`, and named tuples.
DOCUMENTED = frozenset({"_exit", "_replace"})


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def sources() -> Mapping[str, ast.Module]:
    """The modules of hycluster by their path from the root, without what is generated."""
    paths = [path for path in sorted((ROOT / "hycluster").rglob("*.py")) if "_pb2" not in path.name]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


@cache
def own_names() -> frozenset[str]:
    """Names that somebody in hycluster gives to something."""
    names: set[str] = set()
    for tree in sources().values():
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    names.add(node.name)
                case ast.Attribute(attr=attr, ctx=ast.Store(), value=ast.Name(id="self" | "cls")):
                    names.add(attr)
                case ast.Name(id=name, ctx=ast.Store()):
                    names.add(name)
    return frozenset(names)


def imports(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Modules that are imported, and what from them, if it is a part."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from ((module, alias.name) for alias in names)
            case ast.Import(names=names):
                yield from ((alias.name, None) for alias in names)


@cache
def reaches() -> Mapping[str, set[str]]:
    """By module of hycluster, what it reaches of others."""
    found = {path: imported(tree) | touched(tree) | overridden(path) for path, tree in sources().items()}
    return {path: reached for path, reached in found.items() if reached}


def imported(tree: ast.Module) -> set[str]:
    reached: set[str] = set()
    for module, name in imports(tree):
        library = module.partition(".")[0]
        if (library == "vllm" and module not in PUBLIC_VLLM) or (library == "ray" and module not in PUBLIC_RAY):
            reached.add(module)
        if name is not None and is_private(name) and library not in ("hycluster", "__future__"):
            reached.add(name)
    return reached


def touched(tree: ast.Module) -> set[str]:
    """Private attributes of somebody else's."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=attr):
                names.add(attr)
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(str(name)), *_]):
                names.add(name)
    return {name for name in names if is_private(name)} - own_names() - DOCUMENTED


def overridden(path: str) -> set[str]:
    """Private methods of subclasses that their base has too."""
    reached: set[str] = set()
    for node in ast.walk(sources()[path]):
        if isinstance(node, ast.ClassDef):
            own = {part.name for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)}
            for base in foreign_bases(path, node):
                reached |= {name for name in own if is_private(name) and re.search(rf"def {name}\(", source(base))}
    return reached


@cache
def named(path: str) -> tuple[Mapping[str, str], Mapping[str, ast.ClassDef]]:
    """Of a module, by name: where it has it from, and its own classes."""
    tree = sources()[path]
    known = {name: module for module, name in imports(tree) if name is not None}
    return known, {other.name: other for other in ast.walk(tree) if isinstance(other, ast.ClassDef)}


def foreign_bases(path: str, node: ast.ClassDef) -> set[str]:
    """Modules of other libraries that a class has a base from, be it over others of hycluster's."""
    known, local = named(path)
    bases: set[str] = set()
    for base in node.bases:
        name = base.id if isinstance(base, ast.Name) else ""
        module = known.get(name)
        if name in local and local[name] is not node:
            bases |= foreign_bases(path, local[name])
        elif module is not None and module.startswith("hycluster."):
            there = f"{module.replace('.', '/')}.py"
            bases |= foreign_bases(there, named(there)[1][name])
        elif module is not None:
            bases.add(module)
    return bases


@cache
def source(module: str) -> str:
    """The text of a module of an installed library, which is not imported for it."""
    library, _, rest = module.partition(".")
    spec = importlib.util.find_spec(library)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, *rest.split(".")) if rest else Path(folder)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.read_text()
    return ""


@dataclass(frozen=True)
class Row:
    """A row of the docs' tables: its cells, the first one (the module) without its quotes."""

    path: str
    cells: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """What it says that the module reaches; a star stands for whatever follows."""
        return re.findall(r"`([^`]+)`", self.cells[0])

    @property
    def tests(self) -> list[str]:
        return re.findall(r"`(tests/[^`]+)`", self.cells[-1])

    def unlisted(self, reached: set[str]) -> set[str]:
        return {name for name in reached if not any(fnmatchcase(name, listed) for listed in self.names)}

    def idle(self, reached: set[str]) -> set[str]:
        """What is listed and not reached."""
        return {listed for listed in self.names if not any(fnmatchcase(name, listed) for name in reached)}


def rows() -> dict[str, Row]:
    """The docs' rows by module."""
    listed: dict[str, Row] = {}
    for line in DOCS.read_text().splitlines():
        if found := re.match(r"\| `(hycluster/\S+\.py)` \|(.*)\|$", line):
            path, rest = found.groups()
            assert path not in listed, f"docs/reaches.md lists {path} twice"
            listed[path] = Row(path, tuple(cell.strip() for cell in rest.split("|")))
    return listed


def defined(test: str) -> bool:
    """Whether there is such a test: a file, or `file::function` or `file::Class::function` in it."""
    path, *names = test.split("::")
    if not (ROOT / path).is_file():
        return False
    body: list[ast.stmt] = ast.parse((ROOT / path).read_text()).body
    for name in names:
        node = next((n for n in body if getattr(n, "name", None) == name), None)
        if node is None:
            return False
        body = getattr(node, "body", [])
    return True
