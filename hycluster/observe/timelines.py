"""The finished requests of this process: bounded rings of their timelines, for ``hycluster why``.

One recorder a process. A timeline that has ended goes into the ring, and to who else wants it: the exporter of spans,
the line in the log.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hycluster.errors import DeadlineExceeded, HyclusterError, InvalidInput, kind_name
from hycluster.observe.catalogue import INGRESS
from hycluster.stages import summed_up, timeline_json
from hycluster.timeline import Timeline, current
from hycluster.trace_context import TraceContext, written_id

logger = logging.getLogger(__name__)

KEPT_REQUESTS = 1000
# Of those that took longest, so many are kept for so long, whatever came after them.
KEPT_SLOWEST, SLOWEST_FOR_S = 100, 3600.0
MOST_LISTED = 1000

Sampler = Callable[[int, TraceContext | None], bool]


def never(_trace_id: int, _parent: TraceContext | None) -> bool:
    """Nothing is exported."""
    return False


def _nothing() -> None:
    """Nobody was told."""


@dataclass(frozen=True, slots=True)
class Question:
    """What somebody wants to know of all processes' requests.

    Attributes:
        number: tells it from other questions.
        request_id: whose timeline; None asks for a list.
        slowest: how many of those that took longest.
        model: of this model alone.
        bulk: of batch work, and else of online requests.
    """

    number: str
    request_id: str | None = None
    slowest: int = 10
    model: str | None = None
    bulk: bool = False


class _Ended:
    """Requests that have ended: the last ones, and those that took longest.

    Args:
        kept: how many of the last ones.
    """

    def __init__(self, kept: int) -> None:
        self.last: deque[Timeline] = deque(maxlen=kept)
        self._slowest: list[tuple[float, int, Timeline]] = []
        self._numbers = itertools.count()

    def keep(self, timeline: Timeline) -> None:
        self.last.append(timeline)
        entry = (timeline.duration_s, next(self._numbers), timeline)
        if not entry[1] % KEPT_SLOWEST:
            self._forget_old()
        if len(self._slowest) < KEPT_SLOWEST:
            heapq.heappush(self._slowest, entry)
        elif entry[0] > self._slowest[0][0]:
            heapq.heapreplace(self._slowest, entry)

    def _forget_old(self) -> None:
        since = time.time() - SLOWEST_FOR_S
        self._slowest = [entry for entry in self._slowest if entry[2].started > since]
        heapq.heapify(self._slowest)

    def __iter__(self) -> Iterator[Timeline]:
        """The latest first, some twice."""
        yield from reversed(self.last)
        for _, _, timeline in self._slowest:
            yield timeline


class Recorder:
    """What this process knows of the requests that it has carried out.

    Attributes:
        process: ``ingress`` or ``batch``; where a request begins that nobody has begun a timeline for.
        samples: whether a new trace is recorded.
        captures: prompts and outputs of those that are recorded are to be kept.
        ended: told of each timeline once it has ended.
        flush: has what was told of sent on; for who is about to end.
    """

    def __init__(self, kept: int = KEPT_REQUESTS) -> None:
        self.process = "batch"
        self.samples: Sampler = never
        self.captures = False
        self.ended: list[Callable[[Timeline], None]] = []
        self.flush: Callable[[], None] = _nothing
        self._running: OrderedDict[int, Timeline] = OrderedDict()
        # Of rows there may be thousands a second, which must not push out what somebody waits for.
        self._online, self._batch = _Ended(kept), _Ended(kept)
        self._answered: deque[str] = deque(maxlen=100)

    def keep(self, most: int) -> None:
        """Change how many of the last ones are kept."""
        for ended in (self._online, self._batch):
            ended.last = deque(ended.last, maxlen=most)

    def begin(
        self,
        request_id: str,
        operation: str,
        parent: TraceContext | None = None,
        *,
        process: str | None = None,
        model: str = "",
    ) -> Timeline:
        """A request has come. :meth:`end` has to be called, whatever becomes of it."""
        timeline = Timeline(request_id, process or self.process, operation, parent, model=model)
        timeline.sampled = self.samples(timeline.trace_id, parent)
        self._running[id(timeline)] = timeline
        return timeline

    def follow(self, parent: TraceContext | None) -> None:
        """The request that is carried out here is a part of this trace, as is known only now: before any engine has
        heard of it."""
        timeline = current.get()
        if timeline is not None and parent is not None and not timeline.tracks:
            timeline.parent, timeline.trace_id = parent, parent.trace_id
            timeline.sampled = self.samples(parent.trace_id, parent)

    def end(self, timeline: Timeline, status: str = "ok", error: str = "") -> None:
        """A request has ended. One that no engine was asked for is not kept: a flood of refusals must not push out
        what took time."""
        self._running.pop(id(timeline), None)
        if status == "ok" and (broken := timeline.broken):
            status, error = "failed", broken
        timeline.end(status, error)
        if timeline.tracks:
            (self._batch if timeline.bulk else self._online).keep(timeline)
        for tell in self.ended:
            try:
                tell(timeline)
            except Exception:
                # Nobody's answer depends on it.
                logger.warning("a request could not be told of", exc_info=True)

    def _known(self) -> Iterator[Timeline]:
        """All, each once, the latest first."""
        seen = set[int]()
        for timeline in (*reversed(self._running.values()), *self._online, *self._batch):
            if id(timeline) not in seen:
                seen.add(id(timeline))
                yield timeline

    def find(self, request_id: str) -> dict[str, Any] | None:
        """One request's timeline as JSON, also of one that is still on its way; None if it is not known here."""
        known = list(self._known())
        # As its caller wrote it, or as the answer has it; a job's rows have their files' names.
        names = dict.fromkeys((request_id, written_id(request_id)))
        exactly = (timeline for timeline in known if timeline.id in names)
        akin = (timeline for name in names for timeline in known if timeline.known_as(name))
        found = next(exactly, None) or next(akin, None)
        return None if found is None else {**timeline_json(found), "instance": INGRESS}

    def slowest(self, most: int, model: str | None = None, *, bulk: bool = False) -> list[dict[str, Any]]:
        """The online requests that took longest, or rows of batch work, those on their way among them."""
        meant = (each for each in self._known() if each.tracks and each.bulk == bulk and model in (None, each.model))
        return [summed_up(each) for each in heapq.nlargest(most, meant, key=lambda each: each.duration_s)]

    def answer(self, question: Question) -> list[dict[str, Any]] | None:
        """What this process has to say; None if it has been asked already (each of its gateways is)."""
        if question.number in self._answered:
            return None
        self._answered.append(question.number)
        if question.request_id is None:
            return self.slowest(min(question.slowest, MOST_LISTED), question.model, bulk=question.bulk)
        found = self.find(question.request_id)
        return [] if found is None else [found]


recorder = Recorder()


def kept_of(error: Exception) -> str:
    """What a timeline has of an error, and with it the log and traces: nothing that may be a caller's own words."""
    own = isinstance(error, HyclusterError) and not isinstance(error, InvalidInput)
    return f"{kind_name(error)}: {error}"[:500] if own else kind_name(error)


class Carried:
    """The request that is carried out within this block, in this task and those that it starts.

    Of one that somebody further out has begun already, nothing is begun here.
    """

    def __init__(
        self,
        request_id: str,
        operation: str,
        parent: TraceContext | None = None,
        *,
        process: str | None = None,
        model: str = "",
    ) -> None:
        outer = current.get()
        # Tasks that outlive the request that began them have its context.
        self._outer = outer if outer is not None and outer.ended_s is None else None
        self.timeline = self._outer or recorder.begin(request_id, operation, parent, process=process, model=model)

    def __enter__(self) -> Timeline:
        if self._outer is None:
            current.set(self.timeline)
        return self.timeline

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._outer is not None:
            return
        current.set(None)
        timeline = self.timeline
        if isinstance(error, DeadlineExceeded):
            # Its caller waits no more, as one that has left.
            recorder.end(timeline, "cancelled", DeadlineExceeded.__name__)
        elif isinstance(error, Exception):
            recorder.end(timeline, "failed", kept_of(error))
        elif error is not None or timeline.cancelled:
            recorder.end(timeline, "cancelled")
        else:
            recorder.end(timeline, "failed" if timeline.error else "ok", timeline.error)
