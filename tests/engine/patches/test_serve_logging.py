"""With Serve's own set-up of a replica's log, in a process of its own; ``tests/test_logs.py`` has more of it."""

from __future__ import annotations

from pathlib import Path

from tests.test_logs import NEWCOMERS, run

PATCH = "from hycluster.engine.patches.serve_logging import patch_logging; patch_logging()"


def test_serves_handler_stays_whoever_sets_logging_up(tmp_path: Path) -> None:
    (kept, path), text = run(tmp_path, PATCH, NEWCOMERS)
    assert kept
    assert str(path).startswith(str(tmp_path))
    assert text.count("app_it x -- hello from Serve") == 2


def test_unpatched_serve_still_loses_its_file(tmp_path: Path) -> None:
    """When this fails after an upgrade of Ray, the patch may not be needed any more."""
    (_, path), text = run(tmp_path, NEWCOMERS)
    assert path is None
    assert "hello" not in text
