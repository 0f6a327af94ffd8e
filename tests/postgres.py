"""A PostgreSQL server of the machine's, on loopback, which tests kill and start again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# It refuses to be root's.
USER = "postgres"
START_S = 60.0
# Its programs' environment: not what other tests, and libraries that these load, have made of this process's own.
CLEAN = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}


class Postgres:
    """Attributes: url: as SQLAlchemy takes it."""

    def __init__(self, data: Path, bin_folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"postgresql+psycopg://{USER}@127.0.0.1:{self.port}/postgres"
        self._data = data
        self._bin = bin_folder
        # Not `user=`: for it Python forks where it otherwise spawns, and what another test has left of gRPC in this
        # process takes a fork's child down before it becomes the server.
        self._as: list[str | Path] = (
            ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"] if os.getuid() == 0 else []
        )
        self._server: subprocess.Popen[bytes] | None = None
        if self._as:
            shutil.chown(data, USER, USER)
        options: list[str | Path] = ["-D", data, "-U", USER, "--auth=trust", "--no-sync", "-E", "UTF8"]
        done = subprocess.run([*self._as, self._bin / "initdb", *options], check=False, capture_output=True, env=CLEAN)
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)

    def start(self) -> None:
        """Returns when it can be asked."""
        options: list[str | Path] = ["-D", self._data, "-p", str(self.port), "-h", "127.0.0.1", "-k", self._data, "-F"]
        log = (self._data / "log").open("ab")
        self._server = subprocess.Popen(
            [*self._as, self._bin / "postgres", *options], stdout=log, stderr=log, env=CLEAN
        )
        log.close()
        ask: list[str | Path] = [self._bin / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port)]
        end = time.monotonic() + START_S
        while subprocess.run(ask, check=False, capture_output=True).returncode:
            assert time.monotonic() < end, (self._data / "log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        """At once, without a word to those that are connected."""
        if self._server is not None:
            self._server.send_signal(signal.SIGQUIT)
            self._server.wait(30)
            self._server = None


def _bin_folder() -> Path | None:
    found = shutil.which("postgres")
    return (
        Path(found).resolve().parent if found else next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"))), None)
    )


@contextmanager
def postgres(data: Path) -> Iterator[Postgres]:
    """One that runs; skips where there is no PostgreSQL on the machine."""
    folder = _bin_folder()
    if folder is None or not (folder / "initdb").exists():
        pytest.skip("needs a PostgreSQL server on this machine (Debian: postgresql)")
    server = Postgres(data, folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
