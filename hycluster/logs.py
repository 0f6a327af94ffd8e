"""Where the log lines of a process of ours go; settled in one place, before vLLM is imported.

Warnings and worse, whoever says them (vLLM, this package, a library), go where Ray Serve's own lines go: to the
replica's file in ``logs/serve`` of Ray's session, and to standard error. A process that is no Serve replica (a rank
above 0, a replica of a job's own, a batch job's worker, a process that vLLM starts below one of these) writes a file
of its own beside them, once it has something to say.

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
from collections.abc import Mapping
from pathlib import Path

from hycluster.engine.patches.serve_logging import SERVE_LOGGER, patch_logging
from hycluster.terminal import printable

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


def settle(name: str) -> None:
    """Settle the logging of this Ray actor. Does nothing in a process that is none, which has its own ways.

    Args:
        name: what it is, for the name of its file if it is no Serve replica.
    """
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return
    from ray.serve._private.logging_utils import get_serve_logs_dir

    files = Path(get_serve_logs_dir()) / f"hycluster_{name}_{os.getpid()}"
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
    root.addHandler(_Lines(files.with_name(f"{files.name}.log")))
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
        for handler in self._own:
            handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(process)d -- %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        named = copy.copy(record)
        # Who reads the file does so at a terminal.
        named.msg, named.args = printable(f"{record.name}: {record.getMessage()}"), None
        for handler in _serves_handlers() if _has_file(_serves_handlers()) else self._own:
            handler.handle(named)


def _has_file(handlers: list[logging.Handler]) -> bool:
    """Where it only writes to standard error, the process is no replica."""
    return any(isinstance(handler, logging.handlers.MemoryHandler) for handler in handlers)
