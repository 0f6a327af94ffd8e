"""What is said in a replica's process arrives in the file that Ray Serve has given it, whoever sets logging up there.

With Serve's own set-up of a replica and vLLM's of an engine, in a process of its own: both change it for good.
``tests/integration/test_control_plane.py`` shows why it matters.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hycluster import logs
from hycluster.logs import environment
from hycluster.settings.observe import Logs

# As in a replica. Whether Ray runs is all that is not so: Serve is told where its files are.
PROCESS = """
import json, logging, logging.config, os, sys
from pathlib import Path
from ray.serve._private.common import ServeComponentType
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig
folder = Path(sys.argv[1])
configure_component_logger(
    component_name="app_it", component_id="x", component_type=ServeComponentType.REPLICA,
    logging_config=LoggingConfig(logs_dir=str(folder)), max_bytes=1 << 20, backup_count=1,
)
serves = logging.getLogger("ray.serve")
handler = next(each for each in serves.handlers if isinstance(each, logging.handlers.MemoryHandler))
def say():
    for name in ("vllm.some", "hycluster.some", "some"):
        logging.getLogger(name).warning("hello from %s", name)
    serves.info("hello from Serve")
    print(json.dumps([handler in serves.handlers, getattr(handler.target, "baseFilename", None)]))
"""
SETTLE = """
from hycluster import logs
from hycluster.logs import environment
from hycluster.settings.observe import Logs
logs._settle(folder / "replica")
"""
# What another library may do, and the worst.
NEWCOMERS = """
logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "loggers": {"vllm": {}}})
say()
logging.config.dictConfig({"version": 1, "root": {"level": "WARNING", "handlers": []}})
say()
"""


def run(tmp_path: Path, *parts: str, **env: str) -> tuple[list[Any], str]:
    """What the process said of Serve's handler, and Serve's file."""
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join([PROCESS, *parts]), str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=200, env={"PATH": "/usr/bin:/bin", **env},
    )  # fmt: skip
    (file,) = tmp_path.glob("replica_*.log")
    return json.loads(said.stdout.splitlines()[-1]), file.read_text()


def test_what_others_set_up_leaves_serves_file(tmp_path: Path) -> None:
    (kept, path), text = run(tmp_path, SETTLE, NEWCOMERS)
    assert kept
    assert str(path).startswith(str(tmp_path))
    for line in (
        "app_it x -- vllm.some: hello from vllm.some",
        "app_it x -- hycluster.some: hello from hycluster.some",
        "app_it x -- some: hello from some",
        "app_it x -- hello from Serve",
    ):
        assert text.count(line) == 2


def test_a_process_below_has_a_file_beside_it(tmp_path: Path) -> None:
    script = (
        "import logging; from hycluster import logs; logs.settle_below(); logging.getLogger('vllm.x').warning('hm')"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, env={logs._BELOW: str(tmp_path / "replica_x")}
    )
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("replica_x_MainProcess_")
    assert file.read_text().endswith("-- vllm.x: hm\n")


@pytest.mark.slow
def test_vllm_and_its_app_leave_serves_file(tmp_path: Path) -> None:
    """vLLM's own set-up is off, and a library of its app does not silence warnings."""
    everything = """
import vllm.logger
from vllm.config.logging import LoggingConfig
from model_hosting_container_standards.logging_config import configure_root_logger
config = LoggingConfig()
assert not config.configure_logging
vllm.logger.configure_logging(config)
configure_root_logger()
say()
"""
    (kept, path), text = run(tmp_path, SETTLE, everything)
    assert kept
    assert path
    assert text.count("hello") == 4


def test_no_line_is_obeyed_by_the_terminal_that_shows_it(tmp_path: Path) -> None:
    lines = logs._Lines(tmp_path / "it.log")
    lines.emit(logging.LogRecord("n", logging.ERROR, "p", 1, "column %s", ("\x1b]0;mine\x07",), None))
    for handler in lines._own:
        handler.close()
    assert (tmp_path / "it.log").read_text().endswith("n: column \\x1b]0;mine\\x07\n")


def test_where_nobody_reads_them_at_a_terminal_lines_are_json(tmp_path: Path) -> None:
    spoken = """
from hycluster.observe.timelines import Carried, recorder
recorder.samples = lambda *_: True
logger = logging.getLogger("hycluster.some")
with Carried("r-1", "row") as timeline:
    logger.info("not asked for")
    logger.warning("look %s", "here\x1b]0;mine\x07")
    try:
        1 / 0
    except ZeroDivisionError:
        logger.exception("broke")
serves.info("hello from Serve")
print(json.dumps([f"{timeline.trace_id:032x}"]))
"""
    (trace_id,), text = run(tmp_path, SETTLE, spoken, **environment(Logs(format="auto")))
    look, broke, serves = map(json.loads, text.splitlines())
    assert look["time"].endswith("+00:00")
    assert {
        "message": "look here\x1b]0;mine\x07",
        "level": "warning",
        "logger": "hycluster.some",
        "request_id": "r-1",
        "trace_id": trace_id,
        "component": "replica",
    }.items() <= look.items()
    assert "ZeroDivisionError" in broke["exception"]
    assert (serves["message"], serves["level"]) == ("hello from Serve", "info")
    # What a terminal would obey is escaped by JSON.
    assert "\x1b" not in text


def test_a_level_can_be_asked_for_and_text_names_the_request(tmp_path: Path) -> None:
    script = """
import logging
from hycluster import logs
from hycluster.observe.timelines import Carried
logs.settle_below()
with Carried("r-1", "row"):
    logging.getLogger("hycluster.some").info("asked for")
    logging.getLogger("vllm.some").debug("nobody asked")
"""
    env = environment(Logs(level="info", format="text")) | {logs._BELOW: str(tmp_path / "replica_x")}
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=env)
    (file,) = tmp_path.iterdir()
    assert file.read_text().startswith("INFO ")
    assert file.read_text().endswith("-- hycluster.some: asked for request_id=r-1\n")
    assert file.read_text().count("\n") == 1
