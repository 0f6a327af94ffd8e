"""The command ``hycluster``, run as a process that says what it has imported.

Half a second of CPU time of each is the import of the command line, which all have in common. So most are forked from
one that has it (``forks.py``), and of each kind at least one begins as a user's does.

    python -m tests.command ARGUMENT...

runs the command and says at its end what was imported.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from pathlib import Path

from tests.forks import ROOT, Forks

HEAVY = {"ray", "vllm", "torch", "transformers", "pyarrow", "grpc", "pandas", "sqlalchemy"}
Ran = tuple[subprocess.CompletedProcess[str], set[str]]
# What any command has imported when it has read its arguments; with more, ``imported`` would say nothing.
_FORKS = Forks(["hycluster.cli", "typer.rich_utils"])
atexit.register(_FORKS.close)
_SAID = "imported:"


def run(*arguments: str, home: Path | None = None, asked: str = "", timeout_s: float = 60) -> Ran:
    """The finished process, and the top-level modules that it had imported; its standard error without them.

    Args:
        home: None is that of the tests.
        asked: its standard input.
    """
    done = _FORKS.run(
        "tests.command", *arguments, asked=asked, timeout_s=timeout_s, environment=_environment(home), folder=Path.cwd()
    )
    return _read(done)


def run_anew(*arguments: str, home: Path | None = None, asked: str = "", timeout_s: float = 60) -> Ran:
    """The same in a process that imports for itself."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.command", *arguments], env={**os.environ, **_environment(home)}, input=asked,
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    return _read(done)


def _environment(home: Path | None) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {"HYCLUSTER_HOME": str(home)} if home is not None else {}
    return {**own, "COLUMNS": "120", "RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": path}


def _read(done: subprocess.CompletedProcess[str]) -> Ran:
    said, _, imported = done.stderr.rpartition(_SAID)
    done.stderr = said
    return done, set(imported.split())


def _main() -> None:
    atexit.register(lambda: print(_SAID, *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr))
    from hycluster.cli import main

    sys.argv = ["hycluster", *sys.argv[1:]]
    main()


if __name__ == "__main__":
    _main()
