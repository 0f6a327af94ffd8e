"""How the modules are cut. Who may import whom is a contract of its own: ``lint-imports``, in ``make check``."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_LINES = 500


def test_no_module_is_too_long() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ROOT.glob("hycluster/**/*.py")}
    assert len(lines) > 200, "the modules are not where they were"
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}
