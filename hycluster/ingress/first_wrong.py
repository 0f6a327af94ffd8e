"""What is wrong in a list of a request is looked for until it has been found, and not once more for each element.

pydantic goes on to the end, and tells of each element by every kind that it might have been: an item of the Responses
API might be one of some thirty, so nine kilobytes, three thousand ``{}``, took four seconds and 700,000 errors, in
which nothing else ran in the ingress process. Callers are told the first ten.

Reaches into FastAPI's routes for what validates their bodies (``ModelField._type_adapter``), as there is no setting for
it; ``tests/ingress/test_first_wrong.py`` runs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from pydantic_core import SchemaValidator
from starlette.routing import BaseRoute

_LISTS = ("list", "tuple", "set", "frozenset")


def stop_at_first(routes: Iterable[BaseRoute]) -> None:
    """Have routes refuse a list by its first wrong element."""
    for route in routes:
        if isinstance(route, APIRoute):
            for field in route.dependant.body_params:
                adapter: TypeAdapter[Any] = field._type_adapter
                # Models within are built again: those that there are go on to the end.
                adapter.validator = SchemaValidator(_failing_fast(adapter.core_schema), _use_prebuilt=False)


def _failing_fast(schema: Any) -> Any:
    """A copy of pydantic's schema, or of a part of it."""
    if isinstance(schema, dict):
        copied = {key: _failing_fast(value) for key, value in schema.items()}
        return {**copied, "fail_fast": True} if copied.get("type") in _LISTS else copied
    if isinstance(schema, (list, tuple)):
        return type(schema)(map(_failing_fast, schema))
    return schema
