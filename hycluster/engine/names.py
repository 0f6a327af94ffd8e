"""What ``engine`` and ``api`` of a model may say, out of vLLM's source: its import takes longer than a typo is worth.

Where vLLM is not installed nothing is checked; the processes that have it refuse by themselves. Pinned to vLLM 0.32.0:
where it defines its arguments, its choices and its parsers (docs/reaches.md).
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from pathlib import Path
from typing import Any

from hycluster.engine.parsers import AUTO
from hycluster.errors import SettingsError, shown
from hycluster.settings.model import Model

_ENGINE = "engine/arg_utils.py"
_API = "entrypoints/launchers/cli_args.py"
# Where an alias of choices (``CacheDType``) is looked for.
_CHOICES = "config/*.py"
_PARSERS = {
    "tool_call_parser": ("tool_parsers/__init__.py", "_TOOL_PARSERS_TO_REGISTER", "tool_parser_plugin"),
    "reasoning_parser": ("reasoning/__init__.py", "_REASONING_PARSERS_TO_REGISTER", "reasoning_parser_plugin"),
}
_SCALARS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def check_names(model: Model) -> None:
    """Refuse what vLLM would refuse when an engine or an ingress process starts.

    Raises:
        SettingsError: an argument that there is not, or a value that it can't have; with what may have been meant.
    """
    if not (model.engine or model.api) or vllm_source() is None:
        return
    engine = _fields(_ENGINE, ("EngineArgs", "AsyncEngineArgs"))
    where = f"models: {model.name}: engine"
    for name, value in model.engine.items():
        _known(f"{where}.{name}", name, engine, "vLLM's engine has no such argument")
        _allowed(f"{where}.{name}", value, engine[name])
    api = engine | _fields(_API, ("BaseFrontendArgs", "FrontendArgs"))
    where = f"models: {model.name}: api"
    for name, value in model.api.items():
        _known(f"{where}.{name}", name, api, "vLLM's API server has no such argument")
        file, table, plugin = _PARSERS.get(name, ("", "", ""))
        if file and value not in (None, AUTO) and not model.api.get(plugin):
            _known(f"{where}.{name}", str(value), _keys(file, table), f"{shown(value)} is no parser of vLLM's")


@functools.cache
def vllm_source() -> Path | None:
    """The folder of vLLM's source; does not import it."""
    spec = importlib.util.find_spec("vllm")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _known(field: str, name: str, allowed: Any, refusal: str) -> None:
    if name in allowed:
        return
    near = difflib.get_close_matches(name, allowed, n=1) or [
        each for each in allowed if each.replace("_", "") == name.replace("_", "").replace("-", "").lower()
    ]
    raise SettingsError(f"{field}: {refusal}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _allowed(field: str, value: Any, annotation: str) -> None:
    """A value of a plain type, or one of some choices; of anything richer vLLM is the judge."""
    kind, *others = [each.strip() for each in annotation.split("|") if each.strip() != "None"]
    if value is None or others:
        return
    if kind in _SCALARS:
        if not isinstance(value, _SCALARS[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise SettingsError(f"{field}: {shown(value)} is not allowed; must be of type {kind}")
    elif isinstance(value, str) and (choices := _choices(kind)) and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise SettingsError(f"{field}: {shown(value)} is not allowed{meant} (allowed: {', '.join(choices)})")


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _source(file: str) -> Path:
    root = vllm_source()
    assert root is not None
    return root / file


def _fields(file: str, classes: tuple[str, ...]) -> dict[str, str]:
    """The fields of dataclasses, each with its annotation."""
    return {
        line.target.id: ast.unparse(line.annotation)
        for node in _tree(_source(file)).body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def _keys(file: str, name: str) -> list[str]:
    """The keys of a dictionary of a module."""
    value = _assigned(_tree(_source(file)), name)
    return [ast.literal_eval(key) for key in value.keys if key is not None] if isinstance(value, ast.Dict) else []


@functools.cache
def _choices(alias: str) -> tuple[str, ...]:
    """The strings of ``alias = Literal[...]``; none if it is no such thing."""
    for path in sorted(_source(".").glob(_CHOICES)):
        if f"{alias} = Literal[" not in path.read_text(encoding="utf-8"):
            continue
        value = _assigned(_tree(path), alias)
        if isinstance(value, ast.Subscript):
            items = value.slice.elts if isinstance(value.slice, ast.Tuple) else [value.slice]
            if all(isinstance(item, ast.Constant) and isinstance(item.value, str) for item in items):
                return tuple(ast.literal_eval(item) for item in items)
    return ()


def _assigned(module: ast.Module, name: str) -> ast.expr | None:
    """What a module assigns to a name, with or without an annotation."""
    for node in module.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node.value
    return None
