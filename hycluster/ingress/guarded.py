"""The HTTP ingress's door: who calls is known before anything else looks at a request.

What is not listed here as open, or as a model's, is for administrators: routes that are added, or that vLLM brings, are
closed until somebody says otherwise.
"""

from __future__ import annotations

import base64
import binascii
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hycluster.adapters import LOAD, UNLOAD
from hycluster.auth.caller import Caller, calling, check_scope, has_scope
from hycluster.auth.certificate import PeerCertificate, read_certificate
from hycluster.auth.guard import Guard, bearer
from hycluster.errors import HyclusterError, Unauthenticated
from hycluster.ingress.errors import answer_error
from hycluster.ingress.metrics import PAGE

# For probes, which have no key, send nothing, and hear of no model.
OPEN, PROBES = frozenset({"/health"}), frozenset({"GET", "HEAD"})
NOBODY = Caller("", "", "", models=frozenset())
# Paths of OpenAI's, Anthropic's and vLLM's APIs that ask a model, or tell what there is.
FOR_ALL = frozenset(
    {
        "/ping", "/version", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/v1/models", "/v1/chat/completions",
        "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/v1/score",
        "/v1/rerank", "/pooling", "/classify", "/tokenize", "/detokenize",
    }
)  # fmt: skip
BELOW_FOR_ALL = ("/v1/models/", "/v1/responses/", "/static/")
BATCH = ("/v1/files", "/v1/batches")
# Below it is the admin API (``hycluster/admin_api``), for administrators as all that is not listed here.
ORGANIZATION = "/v1/organization"
# Where Anthropic's clients give their key by a header of their own.
ANTHROPIC, API_KEY = "/v1/messages", "x-api-key"


class Guarded:
    """ASGI middleware: lets in who may, and says for all that is done within who that is."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope.get("path", "")
        if scope["type"] == "http" and path in OPEN and scope["method"] in PROBES:
            with calling(NOBODY):
                await self._app(scope, receive, send)
            return
        try:
            if scope["type"] != "http":
                raise Unauthenticated("connection: is of a kind that nobody is let in by")
            credential = _credential(scope)
            caller = await self._guard.caller(credential, _certificate(scope, credential))
            with calling(caller):
                _check_path(path)
        except HyclusterError as error:
            answer = await answer_error(None, error)
            if isinstance(error, Unauthenticated) and _is_for_the_page(scope):
                # A browser asks its user.
                answer.headers.append("WWW-Authenticate", 'Basic realm="hycluster: any name, an API key as password"')
            await answer(scope, receive, send)
            return
        with calling(caller):
            await self._app(scope, receive, send)


def _check_path(path: str) -> None:
    if any(_is_below(path, root) for root in BATCH):
        check_scope("batch", path)
    elif path in (LOAD, UNLOAD):
        # Who manages the whole service loads them for all.
        check_scope("admin" if has_scope("admin") else "adapters", path)
    elif path not in FOR_ALL and not path.startswith(BELOW_FOR_ALL):
        check_scope("admin", path)


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")


def _is_own_origin(headers: Headers) -> bool:
    return "origin" in headers and urlsplit(headers["origin"]).netloc == headers.get("host")


def _is_for_the_page(scope: Scope) -> bool:
    """Asked by a browser for the page, or by the page: the state, or what its playground sends."""
    headers = Headers(scope=scope)
    return any(_is_below(scope["path"], root) for root in (PAGE, "/hycluster")) or _is_own_origin(headers)


def _credential(scope: Scope) -> str | None:
    headers = Headers(scope=scope)
    said = headers.get("authorization", "")
    if not said and _is_below(scope["path"], ANTHROPIC):
        return headers.get(API_KEY)
    return bearer(said) or _password(said, headers)


def _certificate(scope: Scope, credential: str | None) -> PeerCertificate | None:
    """What the connection has shown. A browser shows it unasked, also for pages of others: by itself it counts for
    nothing there."""
    headers = Headers(scope=scope)
    shown = scope.get("extensions", {}).get("tls", {}).get("client_cert_chain")
    if not shown or not (credential or "origin" not in headers or _is_own_origin(headers)):
        return None
    return read_certificate(shown[0].encode())


def _password(authorization: str, headers: Headers) -> str | None:
    """What a browser's user has given. A browser sends it unasked, also for pages of others: those say where they are
    from, by ``Origin``, with all that might change something."""
    kind, _, encoded = authorization.partition(" ")
    if kind.lower() != "basic" or not ("origin" not in headers or _is_own_origin(headers)):
        return None
    try:
        return base64.b64decode(encoded.strip(), validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return None
