from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from hycluster.consent import ask
from hycluster.errors import SettingsError

# What it does at a terminal.
ASK = "from hycluster.consent import ask; import typer; typer.run(lambda: (ask('all of it', yes=False), print('done')))"


def at_a_terminal(answer: bytes) -> tuple[int, str, str]:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", ASK], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        os.write(ours, answer)
        out, err = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    return process.returncode, out, err


def test_who_says_yes_gets_it() -> None:
    assert at_a_terminal(b"y\n")[:2] == (0, "done\n")


@pytest.mark.parametrize("answer", [b"n\n", b"\n"])
def test_who_says_anything_else_does_not(answer: bytes) -> None:
    code, out, err = at_a_terminal(answer)
    assert (code, out) == (1, "")
    assert err.startswith("all of it\nGo on? [y/N] ")
    assert err.endswith("nothing was changed\n")


def test_a_script_must_say_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        with pytest.raises(SettingsError, match=r"^--yes: must be given where there is no terminal") as refused:
            ask("all of it", yes=False)
    assert refused.value.exit_code == 2
    ask("all of it", yes=True)
    assert capsys.readouterr().err == "all of it\n" * 2
