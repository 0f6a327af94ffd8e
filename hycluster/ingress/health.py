"""``/health`` of the HTTP ingress: whether callers are to come here; if not, or not for each model, what is missing.

200 while a request to some model would succeed, or wake it, and this ingress process reaches what can be reached of the
others: a model that can't be served anywhere must not take the others' callers away with it. ``status`` is ``"ready"``
if that is so of all models, else ``"degraded"``; with 503 it is ``"starting"`` until the ingress process has opened,
``"unavailable"`` after. ``/health?model=NAME`` is 200 only while a request to that model would succeed. ``models`` says
for each model how many replicas can serve, how many there are to be, and why starts failed. The gRPC ingress's health
says SERVING at the same times as ``/health`` says 200.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import parse_qs

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hycluster.auth.caller import usable
from hycluster.errors import Unavailable, UnknownModel
from hycluster.ingress.errors import answer_error
from hycluster.pool_health import PoolHealth, able

PATH = "/health"

# By model name.
Pools = Callable[[], Awaitable[Mapping[str, PoolHealth]]]


class WithHealth:
    """ASGI middleware: answers ``/health`` itself.

    Args:
        app: what serves the rest; None while there is none yet.
        terse: name no models; for where whoever asks for the health need not be known.
    """

    def __init__(self, app: ASGIApp | None, pools: Pools, *, terse: bool = False) -> None:
        self._app = app
        self._pools = pools
        self._terse = terse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == PATH and scope["method"] in ("GET", "HEAD"):
            await (await self._health(await self._pools(), _model_asked(scope)))(scope, receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            answer = await answer_error(None, starting(await self._pools()))
            await answer(scope, receive, send)

    async def _health(self, pools: Mapping[str, PoolHealth], model: str | None) -> ASGIApp:
        if model is not None and model not in pools:
            return await answer_error(None, UnknownModel(model, [] if self._terse else list(pools)))
        if model is not None:
            pools = {model: pools[model]}
        serves = self._app is not None and able(pools)
        whole = all(pool.able for pool in pools.values())
        status = ("ready" if whole else "degraded") if serves else "starting" if self._app is None else "unavailable"
        models = {} if self._terse else {"models": {name: pool.told() for name, pool in pools.items()}}
        body = {"status": status, **models}
        return JSONResponse(body, status_code=200 if serves else 503)


def _model_asked(scope: Scope) -> str | None:
    return next(iter(parse_qs(scope.get("query_string", b"").decode("latin-1")).get("model", [])), None)


def starting(pools: Mapping[str, PoolHealth]) -> Unavailable:
    """What a caller hears that comes before the ingress process has opened."""
    pools = {name: pools[name] for name in usable(pools)}
    waiting = [f"{name!r} has {p.replicas_ready} of {p.replicas_wanted} replicas" for name, p in pools.items()]
    troubles = [f"; {name!r}: {p.trouble.told()}" for name, p in pools.items() if p.trouble]
    return Unavailable(f"the service is starting: {', '.join(waiting)}{''.join(troubles)}", retry_after_s=5)
