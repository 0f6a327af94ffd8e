"""Importing what is large: vLLM with torch and transformers is thousands of modules and a million objects that stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """For an import: the garbage collector would look through all of it again and again, and find nothing to free.

    Saves a seventh of the CPU time of vLLM's import (docs/measurements.md), and each replica and ingress starts with
    one.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
