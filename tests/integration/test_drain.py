"""SIGTERM while the service starts. With streams in flight: ``test_rolling.py``, at the end of its cluster."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.integration.conftest import eventually, stop
from tests.ordinary_user import as_ordinary_user

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
TOKENS = 250


def test_sigterm_during_the_start(tiny_model: Path, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    path = tmp_path / "settings.yaml"
    model = {"name": "m", "source": str(tiny_model), "hardware": {"cpus": 0.1, "kv_cache_gib": 0.2}}
    path.write_text(json.dumps({"models": [model], "http": {"port": 0}, "grpc": {"port": 0}}))
    env = {"HYCLUSTER_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(
        as_ordinary_user([sys.executable, "-m", "hycluster", "serve", str(path)], env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )
    try:
        # Ray is up, the engine is not. (While Ray itself starts, its own handler would end the process at once.)
        clusters = tmp_path / "home" / "state" / "clusters"
        eventually(lambda: list(clusters.glob("*.json")), 60, "Ray has started")
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            stop(process)
    assert process.returncode == 0, err
    assert "ready" not in out
    assert "Traceback" not in err
