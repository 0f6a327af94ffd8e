"""Whether an engine gets on with its work: asked of its steps, and not of the process that holds it.

A thread beside the engine looks at the age of its last step while it has work, and gives one that has none a token to
generate now and then, so that a broken engine is found before a caller finds it. An engine that has died or hangs ends
the process, with all below it: its connections close, gateways migrate its streams, Ray Serve starts another.
A process that can't even do that is its watchdog's to kill (``hycluster/watchdog.py``). See ``docs/health.md``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from hycluster.engine.protocol import Engine
from hycluster.settings.pool import Health
from hycluster.watchdog import Watchdog

LOOK_EVERY_S = 0.5


class EngineHealth:
    """Looks after one engine from :meth:`start` to :meth:`stop`.

    Args:
        bounds: the model's settings.
        end: called once, with the reason, when the engine is of no more use.
    """

    def __init__(self, engine: Engine, bounds: Health, end: Callable[[str], None]) -> None:
        self._engine = engine
        self._bounds = bounds
        self._end = end
        self._busy_since: float | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Look no longer; the engine may end."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def problem(self) -> str | None:
        """Why the engine can't serve; None if it can."""
        if self._engine.error is not None:
            return f"engine died: {self._engine.error}"
        age = self._engine.last_step_age_s
        # Had work at every look since then: what it got a moment ago can't be late.
        busy_since = self._busy_since
        if age is None or busy_since is None:
            return None
        age = min(age, time.monotonic() - busy_since)
        return f"engine hung: no step for {age:.0f} s while it has work" if age > self._bounds.hung_after_s else None

    def _keep_looking(self) -> None:
        watchdog = Watchdog(stopped_after_s=self._bounds.stopped_after_s, silent_after_s=self._bounds.hung_after_s)
        idle_since = time.monotonic()
        while not self._stopping.wait(LOOK_EVERY_S):
            watchdog.beat()
            now = time.monotonic()
            if self._engine.last_step_age_s is None:
                self._busy_since = None
                if now - idle_since > self._bounds.probe_after_s:
                    idle_since = now
                    self._engine.probe()
            else:
                idle_since = now
                self._busy_since = self._busy_since or now
            if problem := self.problem():
                self._end(problem)
                break
        watchdog.close()
