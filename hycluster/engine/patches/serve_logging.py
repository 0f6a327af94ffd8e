"""Ray Serve's handlers of a replica's log survive whoever sets logging up.

What: ``logging.config.dictConfig`` leaves the handlers of Serve's logger, of the root logger, and all loggers as they
are.
Why: it closes every handler that the process has, and vLLM and others call it. Serve's handler is closed with the rest:
its file ends there, and when Serve's controller comes back and asks the replica for the name of that file, it takes the
error for a replica that could not start and stops it.
Upstream: none filed for Serve. ray-project/ray#57169 (merged) did the same for Ray Data's loggers, and
python/cpython#123239 (open) is about what ``dictConfig`` does to a ``MemoryHandler``.
Version: Ray 2.60.0. Applied by ``hycluster/logs.py``. Watched by ``tests/engine/patches/test_serve_logging.py``.
"""

from __future__ import annotations

import logging
import logging.config
import logging.handlers
from collections.abc import Iterator
from contextlib import contextmanager

from hycluster.engine.patches.pinned import pinned_to

SERVE_LOGGER = "ray.serve"


def patch_logging() -> None:
    """Put it into this process.

    Raises:
        WrongVersion: another version of Ray is installed.
    """
    # Not at import: a process that settles no logs needs no Ray.
    pinned_to("ray", "2.60.0", __name__)
    # Python's own place for somebody else's; ``dictConfig`` looks it up at every call.
    logging.config.dictConfigClass = _LeavesServes


class _LeavesServes(logging.config.DictConfigurator):
    """What ``dictConfig`` applies a configuration by: Serve's handlers, ours and all loggers there are stay."""

    def configure(self) -> None:
        self.config["disable_existing_loggers"] = False
        with _kept(logging.getLogger(SERVE_LOGGER)), _kept(logging.getLogger()):
            super().configure()


@contextmanager
def _kept(logger: logging.Logger) -> Iterator[None]:
    before = list(logger.handlers)
    targets = [(each, each.target) for each in before if isinstance(each, logging.handlers.MemoryHandler)]
    try:
        yield
    finally:
        for buffer, target in targets:
            buffer.setTarget(target)
        for handler in before:
            # A file that was closed is opened again by the next line.
            logger.addHandler(handler)
