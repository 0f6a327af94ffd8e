"""What the source of a function of somebody else's says; for tests of what is relied on there."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any


def set_on_self(function: Any) -> set[str]:
    """Names of the attributes that a method assigns on ``self``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def calls_on(function: Any, name: str) -> set[str]:
    """Attributes that a function reads of ``self.NAME`` or a local ``NAME``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (f"self.{name}", name)
    }
