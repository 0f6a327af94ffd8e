"""stamina, as whatever is asked again here uses it: by this module, for it is quiet then."""

from __future__ import annotations

import random

from stamina import AsyncRetryingCaller, RetryingCaller, retry_context
from stamina.instrumentation import set_on_retry_hooks

__all__ = ["AsyncRetryingCaller", "RetryingCaller", "as_told", "retry_context"]

# A wait that is named is drawn out by at most this: HTTP names whole seconds, and all who heard the same come at once.
MOST_JITTER_S = 1.0

# It would log a line for each of the thousands of rows of a job that wait, every time, and put a metric beside ours
# with a label for each number of tries. What counts is counted by those who ask.
set_on_retry_hooks(())


def as_told(error: Exception) -> float | bool:
    """For stamina's ``on``: the wait that an error names, and a little more; True (the backoff) where it names none."""
    told_s = getattr(error, "retry_after_s", None)
    return told_s + random.uniform(0, min(told_s, MOST_JITTER_S)) if told_s else True
