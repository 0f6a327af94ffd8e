"""Four processes at five times the limit, one of them killed, and the directory's book, which starts again."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

LIMIT = 1200
OFFERED_PER_S = 5 * LIMIT / 60


@contextlib.contextmanager
def started() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    running: list[subprocess.Popen[bytes]] = []

    def start(*arguments: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.limits.apart", *map(str, arguments)]
        running.append(subprocess.Popen(command, env=os.environ, cwd=Path(__file__).parents[2]))
        return running[-1]

    try:
        yield start
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_a_minute_of_real_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [tmp_path / str(number) for number in range(4)]

    def admitted() -> int:
        return sum(file.stat().st_size for file in files if file.exists())

    with started() as start:
        book = start("book", port)
        processes = [start("process", port, file, LIMIT, OFFERED_PER_S / 4) for file in files]
        eventually(lambda: admitted() > LIMIT / 6, timeout_s=60)
        began_s = time.monotonic()
        processes[0].kill()
        eventually(lambda: admitted() > LIMIT / 3, timeout_s=60)
        book.kill()
        book.wait()
        book = start("book", port)
        # The minute has begun before.
        eventually(lambda: admitted() >= 0.98 * LIMIT, timeout_s=50)
        while time.monotonic() - began_s < 45:
            time.sleep(0.5)
            assert admitted() <= 1.02 * LIMIT
        assert all(file.stat().st_size for file in files)
