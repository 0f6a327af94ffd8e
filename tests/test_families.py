from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from tests.families import titled_below, words_below

# Its child has ended, and is known until it asks.
ABOVE = """
import subprocess, sys
ended = subprocess.Popen([sys.executable, "-c", "pass # ended"], stdout=subprocess.PIPE)
ended.stdout.read()
lives = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read() # lives"], stdin=subprocess.PIPE)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def above() -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-c", ABOVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
    assert words_below(process.pid) == {}


def test_what_lives_is_found(above: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (lives,) = titled_below(above, "# lives")
    assert titled_below(above, "# ended") == []
    assert list(words_below(above).values()) == [lives.cmdline()]

    def gone(process: psutil.Process) -> list[str]:
        raise psutil.NoSuchProcess(process.pid)

    monkeypatch.setattr(psutil.Process, "cmdline", gone)
    assert words_below(above) == {}
