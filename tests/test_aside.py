"""Whose words go to the terminal of a command, and whose to the log; in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMAND = """
import logging, os, sys, threading
from hycluster import aside
logging.basicConfig(level=logging.WARNING)
aside.in_a_command(lambda line: print(line, file=sys.stderr))
os.write(2, b"before\\n")
aside.set_aside()
aside.set_aside()
os.write(2, b"from C++\\n")
threading.Thread(target=print, args=("a raylet died",), name=aside.RAYS_THREAD).start()
print("a result")
logging.warning("ours")
print("last", file=sys.stderr)
"""


def test_what_is_written_past_python_goes_to_a_log(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "HYCLUSTER_HOME": str(tmp_path)},
    )
    (log,) = (tmp_path / "state" / "logs").iterdir()
    assert done.stdout == "a result\n"
    assert done.stderr == f"before\nwhat Ray says for itself: {log}\nWARNING:root:ours\nlast\n"
    assert log.read_text() == "from C++\na raylet died\n"


def test_a_command_that_only_looks_says_where_the_log_is_only_if_it_fails(tmp_path: Path) -> None:
    env = {**os.environ, "HYCLUSTER_HOME": str(tmp_path)}
    quick = COMMAND.replace("file=sys.stderr))\nos.", "file=sys.stderr), quick=True)\nos.")
    done = subprocess.run(
        [sys.executable, "-c", quick], capture_output=True, text=True, timeout=60, check=True, env=env
    )
    assert done.stderr == "before\nWARNING:root:ours\nlast\n"
    failed = quick + "aside.tell_place(lambda line: print(line, file=sys.stderr))\n" * 2
    done = subprocess.run(
        [sys.executable, "-c", failed], capture_output=True, text=True, timeout=60, check=True, env=env
    )
    assert "\nlast\nwhat Ray says for itself: " in done.stderr
    assert done.stderr.count("what Ray says") == 1


def test_in_a_process_that_is_no_command_nothing_is_set_aside(tmp_path: Path) -> None:
    code = COMMAND.replace("aside.in_a_command(", "(lambda _: None)(")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "from C++\n" in done.stderr


def test_old_logs_go(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "logs"
    folder.mkdir(parents=True)
    old, living, new = folder / f"ray-{2**22 + 1}.log", folder / f"ray-{os.getpid()}.log", folder / "ray-1.log"
    for log in (old, living, new):
        log.touch()
    for log in (old, living):
        os.utime(log, (1, 1))
    env = {**os.environ, "HYCLUSTER_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, timeout=60, check=True, env=env)
    assert (old.exists(), living.exists(), new.exists()) == (False, True, True)


WAITS = """
import sys
from hycluster import cli
def plan(*_, **__):
    print("begun", flush=True)
    import time
    time.sleep(60)
import hycluster.planning.source as source
source.read_config = plan
sys.argv = ["hycluster", "plan", sys.argv[1], "--gpu", "H20"]
cli.main()
"""


def test_ctrl_c_exits_130_with_a_word(tmp_path: Path) -> None:
    """A stand-in for work that takes long: reading a file that sleeps."""
    (tmp_path / "config.json").touch()
    command = [sys.executable, "-c", WAITS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == "stopped by Ctrl-C before it was done\n"


def test_standard_error_that_a_caller_has_replaced_is_left_alone() -> None:
    """typer's test runner found its own closed."""
    replaced = COMMAND.replace("aside.set_aside()", "aside.set_aside(); assert sys.stderr is own", 1)
    code = f"import io, sys; own = sys.stderr = io.StringIO()\n{replaced}\nsys.__stdout__.write(own.getvalue())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "before\nfrom C++\n"
    assert "WARNING:root:ours\nlast\n" in done.stdout


def test_the_last_words_of_who_watches_ray_are_not_rays(tmp_path: Path) -> None:
    """They went to the log, and nobody read why the command ended."""
    code = f"{COMMAND}\nfrom hycluster.serving import cluster_watch\ncluster_watch._quiet_ray()\n"
    code += 'print("lost: Ray", file=sys.stderr)'
    env = {**os.environ, "HYCLUSTER_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=env)
    assert done.stderr.endswith("last\nlost: Ray\n")
