"""The page at ``/ui`` of the HTTP ingress, and the state that it shows as JSON at ``/hycluster/status``.

Pages are rendered here, and whole without a script; the script keeps them fresh and runs the playground. What other
processes and callers say, names, ids and errors, is text and never HTML: Jinja escapes all of it, the script sets text
only, and a Content-Security-Policy without inline script or style is behind both. No page holds a prompt or an answer;
those of the playground are in the browser alone.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Awaitable, Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from hycluster.ingress.metrics import PAGE as UI
from hycluster.ingress.metrics import PAGE_STATUS as STATUS
from hycluster.page.plots import bars, line
from hycluster.page.timelines import ask_slowest, ask_timeline
from hycluster.state import usage_words, words
from hycluster.state.cluster_state import ClusterState
from hycluster.state.usage_state import UsageState

ASSETS = {"page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LONGEST_ID = 256
SLOWEST = 10

Watch = Callable[[], Awaitable[ClusterState]]
LookAtUsage = Callable[[], Awaitable[UsageState]]


def with_page(watch: Watch, others: ASGIApp, usage: LookAtUsage | None = None) -> ASGIApp:
    """Puts the page and the state beside an HTTP ingress's other routes.

    Args:
        watch: says the cluster's state.
        usage: says who has had how much; None where there is no ledger.
    """
    pages = _Pages(watch, others, usage)
    # GET, and HEAD with it.
    routes = [
        Route(STATUS, pages.status),
        Route(UI, pages.pools),
        Route(f"{UI}/", pages.home),
        Route(f"{UI}/jobs", pages.jobs),
        Route(f"{UI}/usage", pages.usage),
        Route(f"{UI}/requests", pages.requests),
        Route(f"{UI}/playground", pages.playground),
        Route(f"{UI}/static/{{name}}", pages.asset),
    ]
    return Router(routes, default=others, redirect_slashes=False)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    of_state = ("span", "percent", "count", "clock", "load_of", "replicas_of", "progress_of", "left_of")
    environment.globals |= {name: getattr(words, name) for name in of_state}
    environment.globals |= {name: getattr(usage_words, name) for name in ("money", "named_owner", "limit_of")}
    return environment


@functools.cache
def _asset(name: str) -> bytes:
    return (importlib.resources.files(__package__) / "static" / name).read_bytes()


class _Pages:
    def __init__(self, watch: Watch, others: ASGIApp, usage: LookAtUsage | None) -> None:
        self._watch = watch
        self._others = others
        self._usage = usage

    async def status(self, _: Request) -> Response:
        return JSONResponse((await self._watch()).told(), headers=HEADERS)

    async def home(self, _: Request) -> Response:
        return RedirectResponse(UI, headers=HEADERS)

    async def pools(self, _: Request) -> Response:
        state = await self._watch()
        minutes = state.traffic.minutes
        return self._page(
            "pools",
            state,
            requests=bars([(each.answered, each.unanswered) for each in minutes], [each.at for each in minutes]),
            tokens=bars(
                [(each.output_tokens + each.batch_output_tokens, 0) for each in minutes], [each.at for each in minutes]
            ),
            waits=line([each.ttft_p95_s for each in minutes]),
        )

    async def jobs(self, _: Request) -> Response:
        return self._page("jobs", await self._watch())

    async def usage(self, _: Request) -> Response:
        usage = None if self._usage is None else await self._usage()
        return self._page("usage", await self._watch(), usage=usage)

    async def requests(self, request: Request) -> Response:
        asked = request.query_params.get("id", "").strip()[:LONGEST_ID]
        key = request.headers.get("authorization")
        timeline, slowest = None, await ask_slowest(self._others, SLOWEST, key)
        if asked:
            timeline = await ask_timeline(self._others, asked, key)
        # One that is not known is not found, for those who ask without looking.
        status = 404 if asked and timeline is None else 200
        return self._page("requests", await self._watch(), status, asked=asked, timeline=timeline, slowest=slowest)

    async def playground(self, _: Request) -> Response:
        return self._page("playground", await self._watch())

    async def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in ASSETS:
            return Response(status_code=404, headers=HEADERS)
        return Response(_asset(name), media_type=ASSETS[name], headers=HEADERS)

    def _page(self, name: str, state: ClusterState, status: int = 200, **more: Any) -> Response:
        text = _environment().get_template(f"{name}.html.jinja").render(page=name, state=state, **more)
        return HTMLResponse(text, status_code=status, headers=HEADERS)
