"""What a look at one thing came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of ``hycluster doctor``.

    Attributes:
        verdict: ``warn`` is what may do and may not; ``bad`` keeps the service from starting or from working.
        what: what was found, with its figures.
        todo: what to do about it; empty if there is nothing to do.
    """

    name: str
    verdict: Literal["ok", "warn", "bad"]
    what: str
    todo: str = ""


def ok(name: str, what: str) -> Finding:
    return Finding(name, "ok", what)


def warn(name: str, what: str, todo: str) -> Finding:
    return Finding(name, "warn", what, todo)


def bad(name: str, what: str, todo: str) -> Finding:
    return Finding(name, "bad", what, todo)
