"""Whether a batch will miss the end of its window. Pure: whoever asks brings the time along."""

from __future__ import annotations

from collections import deque

# The pace is that of so many seconds. Longer than a burst of online requests, shorter than any window worth the name.
PACE_S = 300.0
# Before there is a pace: so many seconds, or this share of the window.
LEAST_S, LEAST_SHARE = 30.0, 0.1
# How much longer than at its pace the rest of a batch may take.
MARGIN = 1.25


class Lateness:
    """Of one batch.

    Args:
        window_s: from when it was begun here until its end.
        ends_at: the end of its window.
    """

    def __init__(self, window_s: float, ends_at: float) -> None:
        self._ends_at = ends_at
        self._least_s = min(LEAST_S, LEAST_SHARE * window_s)
        self._samples: deque[tuple[float, int]] = deque()

    def late(self, done: int, left: int, now: float) -> bool:
        """At the pace of the last minutes it will not be through in time.

        Args:
            done: lines so far, since it was begun here.
            left: lines that are still to be done.
        """
        self._samples.append((now, done))
        while now - self._samples[0][0] > PACE_S:
            self._samples.popleft()
        since, before = self._samples[0]
        if not left or now - since < self._least_s:
            return False
        pace = (done - before) / (now - since)
        return pace <= 0 or now + MARGIN * left / pace > self._ends_at
