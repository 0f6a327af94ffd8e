"""Which model's app a request over HTTP is for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from urllib.parse import parse_qs

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hycluster.auth.caller import check_model, current_caller, usable
from hycluster.errors import InvalidInput, UnknownModel
from hycluster.ingress.errors import answer_error
from hycluster.ingress.metrics import MODEL_KEY

MODELS = "/v1/models"


class ModelDispatch:
    """ASGI app: hands a request to the app of the model that it names: in its JSON body, by the query parameter
    ``model``, or in its path below ``/v1/models``.

    Args:
        apps: by model name; the first one answers what names no model.
        model_of: the model that a name stands for: its own, or one of its adapters'.
        served: all such names.
        controls: whether a request acts on one model alone; where there are several, it has to name it.
    """

    def __init__(
        self,
        apps: Mapping[str, ASGIApp],
        model_of: Callable[[str], str | None],
        served: Callable[[], list[str]],
        controls: Callable[[Scope], bool] = lambda _: False,
    ) -> None:
        self.apps = dict(apps)
        self._model_of = model_of
        self._served = served
        self._controls = controls
        self.default = next(iter(self.apps.values()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.default(scope, receive, send)
            return
        caller = current_caller.get()
        restricted = caller is not None and caller.models is not None
        looks, method, path = restricted or len(self.apps) > 1, scope["method"], scope["path"]
        if looks and method == "GET" and path == MODELS:
            await self._models_of_all(scope, receive, send)
            return
        if restricted:
            try:
                receive = await self._checked(scope, receive)
            except UnknownModel as error:
                await (await answer_error(None, error))(scope, receive, send)
                return
        name, receive = await named_by(scope, receive, in_body=looks)
        await (await self._app_of(name, scope))(scope, receive, send)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """For a caller who may not use every model: all that he names, and what answers if his body names none.

        Raises:
            UnknownModel: one of them he may not use.
        """
        in_body = ""
        elsewhere, _ = await named_by(scope, receive, in_body=False)
        if scope["method"] == "POST":
            body, receive = await read_on(receive)
            in_body = name_in(body)
            if not in_body:
                check_model(self._model_of(elsewhere) or next(iter(self.apps)))
        for name in filter(None, (in_body, elsewhere)):
            check_model(name)
        return receive

    async def _app_of(self, name: str, scope: Scope) -> ASGIApp:
        model = self._model_of(name) if name else None
        if model is not None:
            _name(scope, model)
            return self.apps[model]
        if name:
            return await answer_error(None, UnknownModel(name, usable(self._served())))
        if len(self.apps) > 1 and self._controls(scope):
            served = ", ".join(map(repr, self.apps))
            return await answer_error(
                None, InvalidInput(f"model: must be named, by the query parameter 'model'; served are {served}")
            )
        if len(self.apps) == 1:
            _name(scope, next(iter(self.apps)))
        return self.default

    async def _models_of_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        statuses, listed = [], []
        for app in self.apps.values():
            code, body = await answer_of(app, scope, receive)
            statuses.append(code)
            if body:
                listed += json.loads(body).get("data", [])
        # One that can't be asked yet leaves the others listed.
        status = min(statuses)
        shown = set(usable(card["id"] for card in listed))
        listed = [card for card in listed if card["id"] in shown]
        await JSONResponse({"object": "list", "data": listed}, status_code=status)(scope, receive, send)


def _name(scope: Scope, model: str) -> None:
    """For who counts the request."""
    if (names := scope.get(MODEL_KEY)) is not None:
        names.append(model)


async def named_by(scope: Scope, receive: Receive, *, in_body: bool) -> tuple[str, Receive]:
    """The model that a request names, empty if it names none, and what lets an app read the request again.

    Args:
        in_body: whether its body is read, too.
    """
    method, path = scope["method"], scope["path"]
    name = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("model", [""])[0]
    if method == "GET" and path.startswith(f"{MODELS}/"):
        name = path.removeprefix(f"{MODELS}/")
    if in_body and method == "POST":
        body, receive = await read_on(receive)
        name = name_in(body) or name
    return name, receive


async def read_on(receive: Receive) -> tuple[bytes, Receive]:
    """A request's body, and what lets the app read it again; nothing of one that its caller left in the midst of."""
    messages, body = [], b""
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request":
            body = b""
            break
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    replay = iter(messages)

    async def replayed() -> Message:
        return next(replay, None) or await receive()

    return body, replayed


def name_in(body: bytes) -> str:
    """The model that a body names; empty if it names none."""
    try:
        model = json.loads(body).get("model")
    except (ValueError, AttributeError, RecursionError):
        # Whichever app is asked refuses it.
        return ""
    return model if isinstance(model, str) else ""


async def answer_of(app: ASGIApp, scope: Scope, receive: Receive) -> tuple[int, bytes]:
    """Call an ASGI app without a body and keep its answer."""
    status, body = 500, b""
    asked = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def empty() -> Message:
        # The caller's own message can be had only once, and there are several apps to ask.
        return next(asked, None) or await receive()

    async def keep(message: Message) -> None:
        nonlocal status, body
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            body += message.get("body", b"")

    await app(dict(scope), empty, keep)
    return status, body
