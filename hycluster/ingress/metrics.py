"""``/metrics`` of the HTTP ingress, and the count of all that comes to it.

``/metrics?replica=ID`` shows one replica's series alone: what an endpoint picker of the Gateway API's inference
extension reads of a model server.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from urllib.parse import parse_qs

from prometheus_client.metrics_core import Metric
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hycluster.errors import NotFound
from hycluster.ingress import health
from hycluster.ingress.errors import answer_error
from hycluster.ingress.timelines import PATH as REQUESTS
from hycluster.ingress.timelines import TIMELINE_KEY
from hycluster.observe.ingresses import HttpRequest, http_began, http_ended
from hycluster.observe.scrape import of_replica, own_families, page
from hycluster.timeline import Timeline, exemplar

METRICS = "/metrics"
# In a request's scope, where what finds its model leaves the name: a list, as a layer may go on with a copy of it.
MODEL_KEY = "hycluster.model"
# What probes and scrapers ask, again and again.
UNCOUNTED = frozenset({METRICS, health.PATH})
OTHER = "none"
# Where the page is (``hycluster/page``), and the state that it shows.
PAGE, PAGE_STATUS = "/ui", "/hycluster/status"
# Paths below these are a file's, a batch's, a response's, a model's, a project's, a request's, or parts of the page.
BELOW = ("/v1/files", "/v1/batches", "/v1/responses", "/v1/models", "/v1/organization", REQUESTS, PAGE)
# As nginx has it: the caller left before the answer began.
LEFT = 499

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# Of all ingress processes behind this address.
Families = Callable[[], Awaitable[Sequence[Metric]]]


async def families_of_this_process() -> Sequence[Metric]:
    """Where it is the only one that listens."""
    return await own_families()


class WithMetrics:
    """ASGI middleware: answers ``/metrics`` itself."""

    def __init__(self, app: ASGIApp, families: Families) -> None:
        self._app = app
        self._families = families

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/") != METRICS or scope["method"] not in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        asked = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        families = await self._families()
        if replica_id := next(iter(asked.get("replica", [])), None):
            families = of_replica(families, replica_id)
            if not families:
                answer = await answer_error(None, NotFound(f"replica: {replica_id[:80]!r} is not known here"))
                await answer(scope, receive, send)
                return
        body, content_type = await page(families, Headers(scope=scope).get("accept", ""))
        await Response(body, headers={"content-type": content_type})(scope, receive, send)


class Counted:
    """ASGI middleware around all: counts requests, what they take and how they end.

    Args:
        routes: templates of the models' paths; what is none of them, nor of ours, is counted as one.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[str]) -> None:
        self._app = app
        self._exact = frozenset(route for route in (*routes, *BELOW, PAGE_STATUS) if "{" not in route)
        self._below = re.compile(f"({'|'.join(map(re.escape, BELOW))})/[^/]+(?:/(cancel|content|input_items))?")

    def _handler(self, path: str) -> str:
        path = path.rstrip("/") or path
        if path in self._exact:
            return path
        # Ids are the callers' own words: each would be a series.
        if below := self._below.match(path):
            return f"{below[1]}/{{id}}" + (f"/{below[2]}" if below[2] else "")
        return OTHER

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        status, read, written, left = 0, 0, 0, False

        async def counted_receive() -> Message:
            nonlocal read, left
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
            else:
                left = True
            return message

        def counted_send(message: Message) -> Awaitable[None]:
            nonlocal status, written
            if message["type"] == "http.response.start":
                # What is answered to nobody is no answer.
                status = LEFT if left else message["status"]
            else:
                written += len(message.get("body", b""))
            return send(message)

        models: list[str] = []
        timelines: list[Timeline] = []
        scope[MODEL_KEY], scope[TIMELINE_KEY] = models, timelines
        http_began()
        try:
            await self._app(scope, counted_receive, counted_send)
        except BaseException:
            status = status or (LEFT if left else 500)
            raise
        finally:
            handler = self._handler(scope["path"])
            http_ended(
                HttpRequest(
                    # What there is not is no model's, least of all that of the only one's app, which says so.
                    model=models[-1] if models and status != NotFound.http_status else "",
                    method=scope["method"] if scope["method"] in METHODS else OTHER,
                    handler=handler,
                    status=status or LEFT,
                    duration_s=time.perf_counter() - began_s,
                    request_bytes=read,
                    response_bytes=written,
                    trace=exemplar(timelines[-1]) if timelines else None,
                ),
                counted=handler not in UNCOUNTED,
            )
