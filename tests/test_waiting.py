from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S, eventually, until

TESTS = Path(__file__).parent
LEAST_S = 20
# By the call's name, where its limit is, or how it is named.
LIMITS = {"timeout": 0, "wait_for": 1, "until": 1, "eventually": 1}


def short(tree: ast.AST, expected: bool = False) -> Iterator[ast.Call]:
    """Waits with a limit that a busy machine may reach, but for those whose end the test expects."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.With | ast.AsyncWith):
            held = " ".join(ast.unparse(item.context_expr) for item in node.items)
            yield from short(node, expected or "TimeoutError" in held or "raises(" in held)
            continue
        if isinstance(node, ast.Call) and not expected:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            # Of a scheduler's own clock.
            if name in LIMITS and ast.unparse(node.func) != "case.until":
                given = [*node.args[LIMITS[name] :][:1], *(k.value for k in node.keywords if k.arg == "timeout_s")]
                numbers = [limit.value for limit in given if isinstance(limit, ast.Constant)]
                if any(isinstance(number, int | float) and number < LEAST_S for number in numbers):
                    yield node
        yield from short(node, expected)


def test_no_limit_is_one_that_a_busy_machine_reaches() -> None:
    found = [
        f"{file.relative_to(TESTS)}:{call.lineno}: {ast.unparse(call)}"
        for file in sorted(TESTS.rglob("*.py"))
        for call in short(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "is_short"),
    [
        ("asyncio.timeout(5)", True),
        ("asyncio.timeout(PATIENCE_S)", False),
        ("await asyncio.wait_for(read(), 2)", True),
        ("eventually(lambda: done, timeout_s=1)", True),
        ("eventually(idle, 60, 'idle')", False),
        ("with contextlib.suppress(TimeoutError):\n    await asyncio.wait_for(read(), 2)", False),
    ],
)
def test_a_short_one_is_found(source: str, is_short: bool) -> None:
    assert bool([*short(ast.parse(source))]) == is_short


def clock_reads(tree: ast.Module) -> list[str]:
    """What a file reads of the clock when it is imported, up to half an hour before its tests run."""
    values = [node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
    calls = [ast.unparse(node.func) for value in values for node in walked(value) if isinstance(node, ast.Call)]
    return [call for call in calls if call in ("time.time", "time.time_ns") or call.endswith((".now", ".today"))]


def walked(node: ast.AST) -> Iterator[ast.AST]:
    """All of it that is evaluated at once."""
    if not isinstance(node, ast.Lambda):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from walked(child)


def test_no_date_is_that_of_the_import() -> None:
    assert clock_reads(ast.parse("NOW = int(time.time())")) == ["time.time"]
    assert clock_reads(ast.parse("FORGED = {'old': lambda: token(exp=time.time() - 1)}")) == []
    read = {file.relative_to(TESTS): clock_reads(ast.parse(file.read_text("utf-8"))) for file in TESTS.rglob("*.py")}
    assert {file: calls for file, calls in read.items() if calls} == {}


async def test_what_never_comes_fails() -> None:
    with pytest.raises(AssertionError):
        eventually(lambda: False, timeout_s=0.01)
    with pytest.raises(TimeoutError):
        await until(lambda: False, timeout_s=0.01)
    assert PATIENCE_S >= LEAST_S
