"""``/health`` of the HTTP door: whether a request to any model would succeed, or wake it; if not, what is missing.

200 with ``{"status": "ready", ...}``, or 503 with ``"starting"`` until the door has opened, ``"unavailable"`` after.
``models`` says for each model how many replicas can serve and how many there are to be. The gRPC door's health says
SERVING at the same times.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hycluster.errors import Unavailable
from hycluster.ingress.errors import answer_error

PATH = "/health"


@dataclass(frozen=True, slots=True)
class PoolHealth:
    """One model's replicas: those that take requests, and those that there are to be.

    Attributes:
        wakes: a request that finds none has one started.
    """

    replicas_ready: int
    replicas_wanted: int
    wakes: bool = False

    @property
    def able(self) -> bool:
        return self.replicas_ready > 0 or self.wakes

    def told(self) -> dict[str, int | bool]:
        """As callers read it; a pool that never sleeps says nothing of it."""
        counts = {"replicas_ready": self.replicas_ready, "replicas_wanted": self.replicas_wanted}
        return counts | {"wakes": True} if self.wakes else counts


# By model name.
Pools = Callable[[], Awaitable[Mapping[str, PoolHealth]]]


class WithHealth:
    """ASGI middleware: answers ``/health`` itself. ``app`` is what serves the rest; None while there is none yet."""

    def __init__(self, app: ASGIApp | None, pools: Pools) -> None:
        self._app = app
        self._pools = pools

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == PATH and scope["method"] in ("GET", "HEAD"):
            status, body = self._health(await self._pools())
            await JSONResponse(body, status_code=status)(scope, receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            answer = await answer_error(None, starting(await self._pools()))
            await answer(scope, receive, send)

    def _health(self, pools: Mapping[str, PoolHealth]) -> tuple[int, dict[str, Any]]:
        able = self._app is not None and all(pool.able for pool in pools.values())
        status = "ready" if able else "starting" if self._app is None else "unavailable"
        return 200 if able else 503, {"status": status, "models": {name: p.told() for name, p in pools.items()}}


def starting(pools: Mapping[str, PoolHealth]) -> Unavailable:
    """What a caller hears that comes before the door has opened."""
    waiting = [f"{name!r} has {p.replicas_ready} of {p.replicas_wanted} replicas" for name, p in pools.items()]
    return Unavailable(f"the service is starting: {', '.join(waiting)}", retry_after_s=5)
