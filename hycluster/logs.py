"""Where the log lines of a process of ours go; settled in one place, before vLLM is imported.

Warnings and worse, whoever says them (vLLM, this package, a library), go where Ray Serve's own lines go: to the
replica's file in ``logs/serve`` of Ray's session, and to standard error. A process that is no Serve replica (a rank
above 0, a replica of a job's own, a batch job's worker, a process that vLLM starts below one of these) writes a file
of its own beside them, once it has something to say.

How they look is said by ``logs`` in the settings, which reaches a process by its environment (:func:`environment`): by
default a JSON object a line, as nobody reads them at a terminal. A line that is said while a request is carried out
names it and its trace.

Nobody else may set logging up: vLLM is told not to (``ENVIRONMENT``), and what others configure leaves Serve's
handlers alone (``hycluster/engine/patches/serve_logging.py``, which says why).

Pinned to Ray 2.60.0: the handlers of Serve's logger and the folder of its files (``ray.serve._private``);
``tests/test_logs.py`` says so too.
"""

from __future__ import annotations

import copy
import logging
import logging.handlers
import multiprocessing
import os
import sys
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from hycluster.engine.patches.serve_logging import SERVE_LOGGER, patch_logging
from hycluster.settings.observe import Logs
from hycluster.terminal import printable
from hycluster.timeline import current

# For every process that imports vLLM; inherited by what vLLM starts below.
ENVIRONMENT: Mapping[str, str] = {
    "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # vLLM's app calls a library (model-hosting-container-standards) that sets the root logger, and all of its handlers,
    # to this level; by itself to ERROR, and nobody reads that a replica was lost.
    "SAGEMAKER_CONTAINER_LOG_LEVEL": "WARNING",
}
# Where a process below one of ours writes: the beginning of its file's path.
_BELOW = "HYCLUSTER_LOG_FILES"
_MAX_BYTES = 64 << 20
_LEVEL, _FORMAT = "HYCLUSTER_LOG_LEVEL", "HYCLUSTER_LOG_FORMAT"
# What is told of a record beside what is said.
_REQUEST = ("request_id", "trace_id")
# Of which a line a request is written, where that is asked for.
REQUESTS = "hycluster.requests"
REQUEST_FIELDS = (
    "model", "operation", "status", "error", "duration_s", "ttft_s", "prompt_tokens", "cached_tokens", "output_tokens",
    "replicas",
)  # fmt: skip


def environment(logs: Logs) -> dict[str, str]:
    """For the processes of a service with these settings."""
    return {
        **ENVIRONMENT,
        "VLLM_LOGGING_LEVEL": logs.level.upper(),
        _LEVEL: logs.level.upper(),
        _FORMAT: logs.format,
    }


def folder() -> Path:
    """Where the log files of this machine's processes are, of the Ray cluster that this process has joined."""
    from ray.serve._private.logging_utils import get_serve_logs_dir

    return Path(get_serve_logs_dir())


def settle(name: str) -> None:
    """Settle the logging of this Ray actor. Does nothing in a process that is none, which has its own ways.

    Args:
        name: what it is, for the name of its file if it is no Serve replica.
    """
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return
    files = folder() / f"hycluster_{name}_{os.getpid()}"
    for handler in _serves_handlers():
        if isinstance(handler, logging.handlers.MemoryHandler) and isinstance(handler.target, logging.FileHandler):
            files = Path(handler.target.baseFilename).with_suffix("")
    os.environ[_BELOW] = str(files)
    _settle(files)


def settle_below() -> None:
    """Settle the logging of a process that vLLM has started below one of ours; does nothing in any other."""
    if files := os.environ.get(_BELOW):
        _settle(Path(f"{files}_{multiprocessing.current_process().name}_{os.getpid()}"))


def _settle(files: Path) -> None:
    root = logging.getLogger()
    if any(isinstance(handler, _Lines) for handler in root.handlers):
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_CONFIGURE_LOGGING"] = ENVIRONMENT["VLLM_CONFIGURE_LOGGING"]
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    logging.getLogger("hycluster").setLevel(os.environ.get(_LEVEL, "WARNING"))
    root.addHandler(_Lines(files.with_name(f"{files.name}.log")))
    if wants_json(os.environ.get(_FORMAT, "text")):
        for handler in _serves_handlers():
            # What is behind its buffer writes the file.
            target = handler.target if isinstance(handler, logging.handlers.MemoryHandler) else None
            (target or handler).setFormatter(json_lines(files))
    patch_logging()
    if os.environ.pop("VLLM_LOGGING_CONFIG_PATH", None):
        logging.getLogger(__name__).warning("VLLM_LOGGING_CONFIG_PATH is not heeded; logs are Ray Serve's")


def _serves_handlers() -> list[logging.Handler]:
    return logging.getLogger(SERVE_LOGGER).handlers


class _Lines(logging.Handler):
    """The root logger's handler: hands lines on to those that Serve has now, or to its own where there is no Serve."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened by the first line.
        file = logging.handlers.RotatingFileHandler(path, maxBytes=_MAX_BYTES, backupCount=2, delay=True)
        self._own: list[logging.Handler] = [file, logging.StreamHandler()]
        self._json = wants_json(os.environ.get(_FORMAT, "text"))
        for handler in self._own:
            text = logging.Formatter("%(levelname)s %(asctime)s %(process)d -- %(message)s")
            handler.setFormatter(json_lines(path.with_suffix("")) if self._json else text)

    def emit(self, record: logging.LogRecord) -> None:
        named = copy.copy(record)
        timeline = current.get()
        # Here, where it is said: buffers write it elsewhere. One that is about a request names it by itself.
        if timeline is not None and not hasattr(record, "request_id"):
            named.request_id = timeline.id
            if timeline.sampled:
                named.trace_id = f"{timeline.trace_id:032x}"
        said = record.getMessage()
        if not self._json:
            about = "".join(f" {name}={getattr(named, name)}" for name in _REQUEST if hasattr(named, name))
            # Who reads the file does so at a terminal.
            said = printable(f"{record.name}: {said}{about}")
        named.msg, named.args = said, None
        for handler in _serves_handlers() if _has_file(_serves_handlers()) else self._own:
            handler.handle(named)


def wants_json(form: str) -> bool:
    """Whether lines are to be JSON: where it is asked for, or nobody reads them at a terminal."""
    return form == "json" or (form == "auto" and not sys.stderr.isatty())


def json_lines(files: Path) -> logging.Formatter:
    """A JSON object a line, in ASCII: nothing in it that a terminal would obey. The file's name names the process."""
    import structlog

    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            _when,
            structlog.stdlib.ExtraAdder(allow=(*_REQUEST, *REQUEST_FIELDS)),
            partial(_of, files.name),
            structlog.processors.CallsiteParameterAdder({structlog.processors.CallsiteParameter.PROCESS}),
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(default=str),
        ],
    )


def _of(component: str, _logger: Any, _method: str, said: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    said["component"] = component
    return said


def _when(_logger: Any, _method: str, said: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """When it was said, and not when a buffer was written."""
    record: logging.LogRecord = said["_record"]
    said["time"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    return said


def _has_file(handlers: list[logging.Handler]) -> bool:
    """Where it only writes to standard error, the process is no replica."""
    return any(isinstance(handler, logging.handlers.MemoryHandler) for handler in handlers)
