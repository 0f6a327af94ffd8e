"""One line for whatever a service loses, and one when it is back. Compares one look at it with the one before.

What comes again and again is summed up: a crash loop fills no terminal.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import psutil

from hycluster.errors import one_line, reported
from hycluster.serving.ray_state import CONTROLLER, DIRECTORY, Look, ServiceProcess

# So many lines of one kind within a minute; then one a minute that counts.
LINES_A_MINUTE = 6
MINUTE_S = 60.0
# On a machine that is busy, say with an engine's start, one may be so long silent that has not gone.
SILENT_S = 20.0
# Parts of what Serve says of a process that does not start. All else that it says is told better here, or is patience.
CAN_NOT_START = ("to be scheduled", "failed to start", "scheduling failed")
# In such a state of its deployment a process that goes was asked to.
ON_PURPOSE = frozenset({"UPDATING", "DOWNSCALING"})


@dataclass(slots=True)
class _Kind:
    """What has been said of the processes of one kind."""

    lost_at_s: list[float] = field(default_factory=list)
    lines: list[float] = field(default_factory=list)
    unsaid: int = 0


class Losses:
    """Tells what has changed from look to look.

    Args:
        names: by Serve's deployment, what its processes are called: ``ingress``, ``replica of m``.
        local: addresses whose processes can be looked at here.
    """

    def __init__(
        self, names: Mapping[str, str], local: frozenset[str] = frozenset(), clock: Callable[[], float] = time.time
    ) -> None:
        self._names = names
        self._local = local
        self._clock = clock
        self._last = Look()
        self._kinds: dict[str, _Kind] = {}
        self._started = False
        # Since when those are silent that may only be slow.
        self._silent_s: dict[str, float] = {}
        self._controller_lost_s: float | None = None
        self._directory_lost_s: float | None = None
        # Seen once as gone; the next look decides.
        self._doubtful: set[str] = set()
        self._failures: dict[str, tuple[int, str]] = {}
        self._messages_said: dict[str, str] = {}

    def started(self) -> None:
        """From now on what is new is told too, not only what is back."""
        self._started = True

    def compare(self, look: Look) -> list[str]:
        """What has happened since the last look, a line each."""
        look = self._patiently(look)
        lines = [*self._nodes(look), *self._controller(look), *self._directory(look), *self._troubles(look)]
        if look.deployments is None:
            # The controller is away, or has not read its own state yet: it says nothing of the processes.
            self._last = Look(look.controller, self._last.deployments, self._last.processes, look.overview, look.nodes)
        else:
            lines += self._processes(look)
        lines += self._summaries()
        self._silent_s = {name: since_s for name, since_s in self._silent_s.items() if name in look.late}
        return [f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self._clock()))} {line}" for line in lines]

    def _patiently(self, look: Look) -> Look:
        """The look, in which those that have been silent for a short while are as they were."""
        for name in look.late:
            since_s = self._silent_s.setdefault(name, self._clock())
            if self._clock() - since_s < SILENT_S:
                look = (
                    replace(look, controller=self._last.controller)
                    if name == CONTROLLER
                    else replace(look, overview=self._last.overview)
                )
        return look

    # -- processes ----------------------------------------------------------------------------------

    def _processes(self, look: Look) -> list[str]:
        before = dict(self._last.processes)
        now = {key: _known(process, before.get(key)) for key, process in look.processes.items()}
        lines = []
        for key, process in list(before.items()):
            if key in now:
                self._doubtful.discard(key)
            elif not self._gone(process):
                # Kept, as if it were still there.
                continue
            else:
                del before[key]
                lines += self._lost(process, look)
        for key, process in now.items():
            if key not in before:
                lines += self._new(process, look)
        kept = {key: process for key, process in before.items() if key not in now}
        self._last = Look(look.controller, look.deployments, {**now, **kept}, look.overview, look.nodes)
        return lines

    def _gone(self, process: ServiceProcess) -> bool:
        """Whether a process that the controller does not name is really gone."""
        if process.node in self._local and process.pid is not None and not psutil.pid_exists(process.pid):
            return True
        if process.id in self._doubtful:
            self._doubtful.discard(process.id)
            return True
        self._doubtful.add(process.id)
        return False

    def _lost(self, process: ServiceProcess, look: Look) -> list[str]:
        kind = self._kinds.setdefault(process.deployment, _Kind())
        assert look.deployments is not None
        deployment = look.deployments.get(process.deployment)
        asked = deployment is None or deployment.status in ON_PURPOSE
        if not asked:
            kind.lost_at_s.append(self._clock())
        return self._say(
            process.deployment, f"{'stopped' if asked else 'lost'}: {self._told(process)}; {self._left(process, look)}"
        )

    def _new(self, process: ServiceProcess, look: Look) -> list[str]:
        kind = self._kinds.setdefault(process.deployment, _Kind())
        if kind.lost_at_s:
            after_s = self._clock() - kind.lost_at_s.pop(0)
            return self._say(
                process.deployment, f"back: {self._told(process)} after {after_s:.0f} s; {self._left(process, look)}"
            )
        if not self._started:
            return []
        return self._say(process.deployment, f"new: {self._told(process)}; {self._left(process, look)}")

    def _told(self, process: ServiceProcess) -> str:
        name = self._names.get(process.deployment, process.deployment)
        return f"{name} ({process.id}, pid {process.pid} on {process.node})"

    def _left(self, process: ServiceProcess, look: Look) -> str:
        assert look.deployments is not None
        there = sum(other.deployment == process.deployment for other in look.processes.values())
        deployment = look.deployments.get(process.deployment)
        return f"{there} of {deployment.wanted if deployment else 0} there"

    # -- single ones --------------------------------------------------------------------------------

    def _nodes(self, look: Look) -> list[str]:
        before, now = self._last.nodes, look.nodes
        if not before:
            return []
        lines = []
        for key in before.keys() - now.keys():
            lines += self._say("node", f"lost: node {before[key]} ({key[:12]}); {len(now)} there")
        for key in now.keys() - before.keys():
            lines += self._say("node", f"new: node {now[key]} ({key[:12]}); {len(now)} there")
        return lines

    def _controller(self, look: Look) -> list[str]:
        before, now = self._last.controller, look.controller
        if before is None and self._controller_lost_s is None:
            return []
        lines = []
        if before is not None and now != before:
            self._controller_lost_s = self._silent_s.get(CONTROLLER, self._clock())
            lines += self._say("controller", "lost: Serve's controller; what runs serves on, nothing is replaced")
        if now is not None and self._controller_lost_s is not None:
            after_s = self._clock() - self._controller_lost_s
            self._controller_lost_s = None
            lines += self._say("controller", f"back: Serve's controller after {after_s:.0f} s")
        return lines

    def _directory(self, look: Look) -> list[str]:
        before = self._last.overview and self._last.overview.pid
        now = look.overview and look.overview.pid
        if before is None and self._directory_lost_s is None:
            return []
        lines = []
        if before is not None and now != before:
            self._directory_lost_s = self._silent_s.get(DIRECTORY, self._clock())
            lines += self._say(
                "directory", f"lost: the directory (pid {before}); ingress processes go on with what they know"
            )
        if now is not None and self._directory_lost_s is not None:
            after_s = self._clock() - self._directory_lost_s
            self._directory_lost_s = None
            lines += self._say("directory", f"back: the directory (pid {now}) after {after_s:.0f} s")
        return lines

    def _troubles(self, look: Look) -> list[str]:
        if look.overview is None:
            return []
        lines = []
        for model, trouble in look.overview.troubles.items():
            failures, reason = self._failures.get(model, (0, ""))
            # Each of the first, then as often as their number doubles, or when there is something new to say.
            if trouble.failures >= max(1, 2 * failures) or _alike(trouble.reason) != reason:
                self._failures[model] = (trouble.failures, _alike(trouble.reason))
                lines += self._say(
                    f"start of {model}",
                    f"not started: model {model}: {trouble.told()}; next try in {trouble.retry_in_s:.0f} s",
                )
        lines += self._messages(look)
        for model in self._failures.keys() - look.overview.troubles.keys():
            del self._failures[model]
            if look.overview.ready.get(model):
                lines += self._say(f"start of {model}", f"started: model {model}")
        return lines

    def _messages(self, look: Look) -> list[str]:
        """What only Serve knows of a process that does not start: no node has room, or it died without a word."""
        lines, deployments = [], look.deployments or {}
        for name, deployment in deployments.items():
            if deployment.status == "HEALTHY":
                self._messages_said.pop(name, None)
            message = deployment.message
            if not any(word in message for word in CAN_NOT_START) or reported(message):
                continue
            if _alike(message) != self._messages_said.get(name):
                self._messages_said[name] = _alike(message)
                called = self._names.get(name, name)
                lines += self._say(f"{name}: Serve", f"Serve says of {called}: {one_line(message, 300)}")
        return lines

    # -- how much is said ---------------------------------------------------------------------------

    def _say(self, kind: str, line: str) -> list[str]:
        said = self._kinds.setdefault(kind, _Kind())
        now = self._clock()
        said.lines = [at for at in said.lines if now - at < MINUTE_S]
        if said.unsaid or len(said.lines) >= LINES_A_MINUTE:
            said.unsaid += 1
            return []
        said.lines.append(now)
        return [line]

    def _summaries(self) -> list[str]:
        lines, now = [], self._clock()
        for name, kind in self._kinds.items():
            if kind.unsaid and (not kind.lines or now - kind.lines[-1] >= MINUTE_S):
                called = self._names.get(name, name)
                lines.append(f"again and again: {called}: {kind.unsaid} more losses and returns in the last minute")
                kind.unsaid, kind.lines = 0, [now] * LINES_A_MINUTE
        return lines


def _alike(message: str) -> str:
    """The same for messages that differ in figures only."""
    return re.sub(r"\W|\d", "", message)[:80]


def _known(process: ServiceProcess, before: ServiceProcess | None) -> ServiceProcess:
    """What was known of a process counts until its controller knows it again."""
    return before if before is not None and process.pid is None else process
