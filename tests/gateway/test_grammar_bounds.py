"""What can be seen to be out of bounds in a schema, a regex or a grammar without compiling it."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc
from typing import Any

import pytest

from hycluster.errors import InvalidInput
from hycluster.gateway.grammar_bounds import COUNTS, check_counts

MOST = 1000
FAN_OUT = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)} | {"a60": {"type": "string"}}


def check(kind: str, asked: Any) -> None:
    check_counts(kind, asked if isinstance(asked, str) else json.dumps(asked), MOST)


@pytest.mark.parametrize("count", sorted(COUNTS))
@pytest.mark.parametrize(
    ("within", "place"), [("{}", ""), ('{"properties": {"a": {"items": {}}}}', "/properties/a/items")]
)
def test_counts_anywhere(count: str, within: str, place: str) -> None:
    for number in (MOST + 1, 10**9, 1e9, 10**400):
        schema = within.replace("{}", json.dumps({count: number}))
        with pytest.raises(InvalidInput, match=rf"^structured_outputs\.json: #{place}/{count}: .*at most 1000$"):
            check("json", schema)
    check("json", within.replace("{}", json.dumps({count: MOST})))


@pytest.mark.parametrize(
    ("kind", "asked", "place"),
    [
        ("regex", "a{1001}", "structured_outputs.regex"),
        ("regex", "a{2,1001}", "structured_outputs.regex"),
        ("regex", "a{1001,}", "structured_outputs.regex"),
        ("regex", "a{" + "9" * 10_000 + "}", "structured_outputs.regex"),
        ("grammar", 'root ::= "a"{1001}', "structured_outputs.grammar"),
        ("grammar", 'start: "a" ~ 2 .. 1001', "structured_outputs.grammar"),
        ("json", {"items": {"type": "string", "pattern": "^a{1001}$"}}, "structured_outputs.json: #/items/pattern"),
        ("json", {"properties": {"enum": {"minItems": 1001}}}, "structured_outputs.json: #/properties/enum/minItems"),
        (
            "json",
            {"properties": {"/" * 200: {"minItems": 1001}}},
            f"structured_outputs.json: #/properties/{'/' * 200}/minItems",
        ),
        ("json", {"patternProperties": {"a{1001}": {}}}, "structured_outputs.json: #/patternProperties"),
        (
            "structural_tag",
            {"structures": [{"begin": "<f>", "schema": {"minItems": 1001}, "end": ""}], "triggers": ["<f"]},
            "structured_outputs.structural_tag: #/structures/0/schema/minItems",
        ),
    ],
)
def test_repeats(kind: str, asked: Any, place: str) -> None:
    with pytest.raises(InvalidInput, match="at most 1000") as caught:
        check(kind, asked)
    assert caught.value.message.startswith(f"{place}: ")


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {
            "items": {"$ref": "#/$defs/a~1b"},
            "$defs": {"a/b": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/a~1b"}]}},
        },
        {"$ref": "#/%24defs/a", "$defs": {"a": {"allOf": [{"if": {"$ref": "#/%24defs/a"}}]}}},
        {"allOf": [{"$ref": "#/allOf/0"}]},
        # A property may be called as what holds data.
        {"properties": {"default": {"$ref": "#/properties/default"}}},
        {"properties": {"properties": {"items": {"$ref": "#/properties/properties/items"}}}},
    ],
)
def test_references_that_lead_back(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"^structured_outputs\.json: \$ref .* leads back to itself"):
        check("json", schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"child": {"$ref": "#"}}},
        {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]},
        {"$ref": "#/$defs/a0", "$defs": FAN_OUT},
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.org/schema"},
        {"$ref": "#/$defs/a/9999999999999", "$defs": {"a": []}},
        {"const": {"minItems": 10**9, "$ref": "#"}},
        {"enum": [{"maxLength": 10**9}]},
        {"properties": {"minItems": {"type": "integer", "maximum": 10**18}, "$ref": {"type": "string"}}},
        {"minItems": True},
        [],
        7,
    ],
)
def test_what_is_in_bounds(schema: Any) -> None:
    begun = time.thread_time()
    check("json", schema)
    assert time.thread_time() - begun < 1


@pytest.mark.parametrize("spec", ["{", "[" * 60_000, '{"a":' * 10_000, "\ud800"])
def test_what_is_no_schema_is_left_to_vllm(spec: str) -> None:
    check("json", spec)


def test_deep_ones_take_no_time() -> None:
    schema: Any = {"minItems": 10**9}
    for _ in range(400):
        schema = {"items": schema}
    check("json", schema)


@pytest.mark.parametrize("back", [False, True])
def test_long_chains_of_references_take_no_time(back: bool) -> None:
    chain = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(2000)} | {"a2000": {"$ref": "#"} if back else {}}
    begun = time.thread_time()
    with pytest.raises(InvalidInput) if back else contextlib.nullcontext():
        check("json", {"$ref": "#/$defs/a0", "$defs": chain})
    assert time.thread_time() - begun < 1


def names(number: int) -> str:
    """One of a thousand ways to write the same reference."""
    return "".join(f"%{ord(letter):x}" if number >> place & 1 else letter for place, letter in enumerate("abcdefghij"))


# 64 KiB took two minutes, in which nothing else ran in the process; half a GiB of copies of a name; seconds.
@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("regex", "{1," + " " * 60_000),
        ("regex", "{ " * 30_000),
        ("grammar", "~1 .." + " " * 60_000),
        ("json", {"properties": {"x" * 32_000: [0] * 11_000}}),
        (
            "json",
            {
                "$defs": {"abcdefghij": {"allOf": [0] * 10_000}},
                "items": [{"$ref": f"#/$defs/{names(number)}"} for number in range(900)],
            },
        ),
    ],
    ids=["blanks", "braces", "dots", "long name", "many names"],
)
def test_what_is_hard_to_look_at_takes_neither_time_nor_memory(kind: str, asked: Any) -> None:
    spec = asked if isinstance(asked, str) else json.dumps(asked, separators=(",", ":"))
    assert len(spec) < 64 << 10
    tracemalloc.start()
    begun = time.thread_time()
    check(kind, spec)
    took = time.thread_time() - begun
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 0.5
    assert most < 32 << 20
