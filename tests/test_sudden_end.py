"""What is said of a process that ends without a chance to say it itself."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

ENDS = """
import os, signal, sys
from hycluster.sudden_end import told_if_sudden
with told_if_sudden("it is gone") as dismiss:
    print("within", file=sys.stderr)
    {}
"""


@pytest.mark.parametrize(
    ("how", "code", "last"),
    [
        ("os._exit(1)", 1, "it is gone"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "it is gone"),
        ("pass", 0, "within"),
        ("sys.exit(3)", 3, "within"),
        ("dismiss(); os._exit(1)", 1, "within"),
        ("os.killpg(0, signal.SIGINT)", -signal.SIGINT, "KeyboardInterrupt"),
        # Standard error has become another's by then.
        ("os.dup2(os.open(os.devnull, os.O_WRONLY), 2); os._exit(1)", 1, "it is gone"),
    ],
)
def test_only_a_sudden_end_is_told(how: str, code: int, last: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS.format(how)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (code, last)
