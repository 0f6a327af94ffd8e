"""The systemd unit: systemd can read it, and it fits what the command does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

import pytest

from hycluster.errors import ClusterLost, EngineStartFailed, SettingsError
from hycluster.settings.read import load_settings

ROOT = Path(__file__).parents[1]
UNIT = ROOT / "deployments" / "hycluster.service"


@pytest.fixture(scope="module")
def service() -> dict[str, str]:
    parser = RawConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text())
    return dict(parser["Service"])


def test_it_fits_the_command(service: dict[str, str]) -> None:
    command, settings = service["ExecStart"].split(" serve ")
    assert command.endswith("/bin/hycluster")
    # ``cluster.stop`` takes so much longer than the drain at most.
    assert int(service["TimeoutStopSec"]) >= load_settings(ROOT / settings).drain_timeout_s + 45
    assert service["Restart"] == "on-failure"
    given_up = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert SettingsError.exit_code in given_up
    assert not {ClusterLost.exit_code, EngineStartFailed.exit_code} & given_up
    # Ray's own processes end at a SIGTERM, and cut what is to drain.
    assert service["KillMode"] == "mixed"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (Debian: systemd)")
def test_systemd_can_read_it(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("/opt/hycluster/.venv/bin/hycluster", sys.executable)
    (tmp_path / "hycluster.service").write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "hycluster.service"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
