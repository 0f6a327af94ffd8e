"""Apps that say who they are and what they read, in the place of models' apps."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hycluster.ingress.dispatch import ModelDispatch

SERVED = ["a", "b", "c/d"]


def echo(name: str) -> ASGIApp:
    """An app that says who it is and what body it read; its ``/v1/models`` lists itself."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = (await Request(scope, receive).body()).decode()
        said = {"data": [{"id": name}]} if scope["path"] == "/v1/models" else {"app": name, "body": body}
        await JSONResponse(said)(scope, receive, send)

    return app


def model_of(name: str) -> str | None:
    """Models a and b; b has the adapter c/d."""
    return {"a": "a", "b": "b", "c/d": "b"}.get(name)


def controls(scope: Scope) -> bool:
    return bool(scope["path"] == "/sleep")


def dispatch(*models: str) -> ASGIApp:
    return ModelDispatch({name: echo(name) for name in models or ("a", "b")}, model_of, lambda: SERVED, controls)
