"""What is wrong with settings, in words: one line a field, with its value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from hycluster.errors import shown

# What pydantic says of a pattern is the pattern.
PATTERNS = {
    r"^/.": "must be an absolute path",
    r"^[a-z]{3}$": "must be three small letters, such as 'usd'",
    r"^https?://\S+$": "must be a URL: http://... or https://...",
    r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$": "must be letters, digits and any of . _ / : -, beginning with a letter or digit",
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "must be letters, digits and any of . _ -, beginning with a letter or digit",
    r"^[A-Za-z0-9_.-]*$": "must be letters, digits and any of . _ -",
}
# Sections that are named which have a key of some name.
MOST_NEAR = 3


def explain(kind: type[BaseModel], error: ValidationError, where: str) -> list[str]:
    """One line for each cause.

    Args:
        kind: the settings class that refused its input.
        where: what every line begins with: the file.
    """
    return [_line(kind, problem, where) for problem in _causes(error.errors())]


def near_file(path: Path) -> str:
    """A hint at what the user may have meant: what lies beside it, by nearly its name."""
    try:
        # Without their endings, which make names alike that are not.
        beside = {each.stem: each for each in path.parent.iterdir()}
    except OSError:
        return ""
    near = difflib.get_close_matches(path.stem, beside, n=1)
    return f" (did you mean {str(beside[near[0]])!r}?)" if near else ""


def _causes(problems: list[Any]) -> list[Any]:
    """Without those that only follow from others: pydantic leaves a wrong item out, then finds the list too short."""

    def follows(problem: Any) -> bool:
        depth = len(problem["loc"])
        return problem["type"] == "too_short" and any(
            len(other["loc"]) > depth and other["loc"][:depth] == problem["loc"] for other in problems
        )

    return [problem for problem in problems if not follows(problem)]


def _line(kind: type[BaseModel], problem: Any, where: str) -> str:
    loc = problem["loc"]
    field = ".".join(str(part) for part in loc)
    # The second is what pydantic calls an unknown key of a dataclass.
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys_within(kind, loc[:-1])
        # A key of another section, or one of this that is spelled nearly so.
        near = [*_elsewhere(kind, str(loc[-1]))][:MOST_NEAR] or difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        return f"{where}: {field}: unknown key{hint} (allowed: {', '.join(known)})"
    if problem["type"] == "missing":
        return f"{where}: {field}: is missing"
    if problem["type"] == "value_error":
        return f"{where}: {_located(kind, loc, str(problem['ctx']['error']))}"
    allowed = PATTERNS.get(problem.get("ctx", {}).get("pattern", ""), problem["msg"])
    return f"{where}: {field}: {shown(problem['input'])} is not allowed: {allowed}"


def _located(kind: type[BaseModel], loc: tuple[str | int, ...], message: str) -> str:
    """A validator's message with the whole name of its field; ours begin with the field's own, or ``class.field``."""
    name, _, rest = message.partition(":")
    owner, _, last = name.rpartition(".")
    if rest and last in _keys_within(kind, loc) and owner in ("", *map(str, loc[-1:])):
        return f"{'.'.join(map(str, (*loc, last)))}:{rest}"
    return f"{'.'.join(map(str, loc))}: {message}" if loc else message


def _keys_within(kind: Any, loc: tuple[str | int, ...]) -> list[str]:
    """The keys allowed in what ``loc`` points to."""
    for part in loc:
        if isinstance(part, int):
            continue
        fields = getattr(kind, "model_fields", {})
        if part not in fields:
            return []
        kind = _class_within(fields[part].annotation)
    return sorted(getattr(kind, "model_fields", None) or getattr(kind, "__dataclass_fields__", {}))


def _elsewhere(kind: Any, key: str, way: tuple[str, ...] = ()) -> Iterator[str]:
    """Where a section has this key, from the top."""
    for name, field in getattr(kind, "model_fields", {}).items():
        within = _class_within(field.annotation)
        section = f"{name}[]" if get_origin(field.annotation) is tuple else name
        if key in _keys_within(within, ()):
            yield ".".join([*way, section, key])
        yield from _elsewhere(within, key, (*way, section))


def _class_within(annotation: Any) -> Any:
    """The settings class inside ``X``, ``X | None`` or ``tuple[X, ...]``."""
    for candidate in (annotation, *get_args(annotation)):
        if hasattr(candidate, "model_fields") or hasattr(candidate, "__dataclass_fields__"):
            return candidate
    return annotation
