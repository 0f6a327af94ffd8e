"""The Redis of ``k8s/base``: its command, run by a real redis-server, keeps the password to itself."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.k8s.kustomize import K8S

# What a generator of secrets may come up with, and a line of settings can't hold as it is.
PASSWORD = "pa\"ss #w%d'$x"

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs Debian's redis-server")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    manifests = yaml.safe_load_all((K8S / "base" / "redis.yaml").read_text())
    (server,) = (one for one in manifests if one["kind"] == "StatefulSet")
    container = server["spec"]["template"]["spec"]["containers"][0]
    (tmp_path / "password").write_text(PASSWORD)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (script,) = container["args"]
    script = script.replace("/run/secrets/redis", str(tmp_path)).replace(
        "dir /data", f"dir {tmp_path}\nport {port}\nbind 127.0.0.1"
    )
    process = subprocess.Popen(
        [*container["command"], script], stdout=subprocess.DEVNULL, env={"PATH": os.environ["PATH"]}
    )
    try:
        yield process, port
    finally:
        process.terminate()
        process.wait(30)


def asked(port: int, password: str, *command: str) -> str:
    return subprocess.run(
        ["redis-cli", "-p", str(port), *command],
        capture_output=True, text=True, timeout=30, check=False, env={**os.environ, "REDISCLI_AUTH": password},
    ).stdout.strip()  # fmt: skip


def test_the_password_opens_it_and_is_nowhere_to_be_read(redis: tuple[subprocess.Popen[bytes], int]) -> None:
    process, port = redis
    deadline = time.monotonic() + 30
    while asked(port, PASSWORD, "ping") != "PONG":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert asked(port, "other", "ping") == "NOAUTH Authentication required."
    assert asked(port, PASSWORD, "config", "get", "appendonly") == "appendonly\nyes"
    assert asked(port, PASSWORD, "config", "get", "maxmemory-policy") == "maxmemory-policy\nnoeviction"
    for name in ("cmdline", "environ"):
        assert PASSWORD.encode() not in Path(f"/proc/{process.pid}/{name}").read_bytes()
