"""The HTTP ingress: vLLM's own API app over each model's gateway, behind an allowlist of routes.

Which model's app a request is for is found by :mod:`.dispatch`. The ingress process listens itself: measured against
Ray Serve's proxies in ``docs/measurements.md``.
"""

from __future__ import annotations

import asyncio
import copy
import math
import os
import socket
from argparse import Namespace
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import fastapi
import starlette.exceptions
import uvicorn
from fastapi import APIRouter, FastAPI
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.exceptions import GenerationError

from hycluster.adapters import LOAD, UNLOAD
from hycluster.auth.caller import usable
from hycluster.auth.guard import Guard
from hycluster.engine.patches.broken_streams import patch_message_stream, patch_response_stream
from hycluster.engine.patches.completion_prompts import patch_completions
from hycluster.engine.patches.early_refusals import patch_streams
from hycluster.engine.patches.error_messages import patch_error_messages
from hycluster.engine.patches.message_refusals import patch_messages
from hycluster.engine.patches.response_fields import patch_parts
from hycluster.engine.patches.truncated_responses import patch_responses
from hycluster.engine.patches.unread_tools import patch_tools
from hycluster.errors import HyclusterError, UnknownModel
from hycluster.gateway.gateway import Gateway
from hycluster.gateway.generation import Generator
from hycluster.ingress.adapters import adapter_routes, called_as_by_callers
from hycluster.ingress.body import TOKENIZED_PATHS, BodyLimit
from hycluster.ingress.connection import protocol
from hycluster.ingress.dispatch import MODELS, ModelDispatch
from hycluster.ingress.errors import answer_error, answer_generation_error, answer_http_error, answer_unreadable
from hycluster.ingress.fast_path import FastPath
from hycluster.ingress.first_wrong import quick_to_validate
from hycluster.ingress.forms import anthropic_type, in_form
from hycluster.ingress.guarded import Guarded
from hycluster.ingress.health import WithHealth
from hycluster.ingress.limited import Limited
from hycluster.ingress.metrics import Counted, Families, WithMetrics, families_of_this_process
from hycluster.ingress.ports import bind, notice_lost_callers
from hycluster.ingress.tiered import Tiered
from hycluster.ingress.timelines import RequestsRoute
from hycluster.ingress.tls import Certificate
from hycluster.ingress.wording import InOurWords
from hycluster.settings.api import check_environment
from hycluster.settings.ingress import Http
from hycluster.settings.load import MAX_MEMBERS

# What a caller may use. Everything else of vLLM's app (scaling, raw token routes, rendering for
# disaggregated setups, SageMaker's doubles, ...) answers 404 unless ``http.control_routes`` is set.
OPEN_ROUTES = frozenset(
    {
        "/health",
        "/version",
        "/metrics",
        "/openapi.json",
        "/docs",
        "/docs/oauth2-redirect",
        "/static",
        "/v1/models",
        "/v1/models/{name:path}",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/v1/score",
        "/v1/rerank",
        "/pooling",
        "/classify",
        "/tokenize",
        "/detokenize",
    }
)


patch_error_messages()
patch_parts()

# Of control routes those that find their model by themselves.
FOR_ALL_MODELS = frozenset({LOAD, UNLOAD})


class HttpIngress:
    """An HTTP ingress that is open. ``port`` is the one it listens on."""

    def __init__(self, server: uvicorn.Server, serving: asyncio.Task[None], port: int) -> None:
        self.port = port
        self._server = server
        self._serving = serving

    async def stop(self) -> None:
        """Take no new connections, finish the requests in flight, return."""
        self._server.should_exit = True
        await self._serving


async def serve_http(
    generator: Generator,
    settings: Http,
    *,
    max_members: int = MAX_MEMBERS,
    guard: Guard | None = None,
    certificate: Certificate | None = None,
    around: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    before_models: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    page: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    metrics: Families = families_of_this_process,
    reuse_port: bool = False,
    drain_timeout_s: float = 60.0,
    sock: socket.socket | None = None,
) -> HttpIngress:
    """Open the HTTP ingress.

    Args:
        guard: knows who may call; None: whoever comes.
        certificate: for TLS; None is plain text.
        sock: listens already; None opens the settings' port.
        before_models: puts a layer before the app of all models.
        metrics: what ``/metrics`` shows.
        around: puts routes that are not a model's beside the app of all models; bounds their bodies itself.
        page: puts the page before all of these; what it shows of requests it asks them, in process.

    Raises:
        SettingsError: the port is in use.
    """
    apps = await model_apps(generator, settings, max_members)
    app: ASGIApp = BodyLimit(
        before_models(over_all_models(apps, generator)),
        settings.max_body_mib << 20,
        max_total_bytes=settings.max_bodies_mib << 20,
        stall_s=settings.stalled_client_timeout_s,
        max_members=max_members,
        paths=TOKENIZED_PATHS,
    )
    app = around(app)
    if settings.serves_ui:
        # All gateways follow the same directory, and have found it when somebody asks.
        app = RequestsRoute(app, lambda: next((g.directory for g in generator.gateways.values()), None))
    app = WithMetrics(WithHealth(page(app), generator.pools, terse=guard is not None), metrics)
    if guard is not None:
        app = Guarded(app, guard)
    app = Counted(in_form(app, settings.allowed_origins), OPEN_ROUTES)
    sock = sock or bind(settings.host, settings.port, "http.port", reuse_port=reuse_port)
    notice_lost_callers(sock, settings.stalled_client_timeout_s)
    config = uvicorn.Config(
        app,
        http=protocol(settings),
        ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=math.ceil(drain_timeout_s),
    )
    server = _Server(config)
    for model in apps.values():
        model.set_server(server)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:
        if serving.done():
            await serving
        await asyncio.sleep(0.01)
    return HttpIngress(server, serving, sock.getsockname()[1])


async def model_apps(generator: Generator, settings: Http, max_members: int = MAX_MEMBERS) -> dict[str, ModelApp]:
    """vLLM's API app of each model, by its name.

    Raises:
        SettingsError: vLLM would take from the environment what is no setting here.
    """
    check_environment(os.environ)
    apps = {name: ModelApp(gateway, settings, generator, max_members) for name, gateway in generator.gateways.items()}
    for app in apps.values():
        if app.can_build:
            await app.build()
    return apps


class ModelApp:
    """ASGI app: vLLM's API app of one model, built as soon as it is known what the model can do.

    What generates is known by its settings. Else only an engine knows, and until there has been one all is refused.
    """

    def __init__(self, gateway: Gateway, settings: Http, generator: Generator, max_members: int = MAX_MEMBERS) -> None:
        self._gateway = gateway
        self._settings = settings
        self._generator = generator
        self._max_members = max_members
        self._building = asyncio.Lock()
        self._server: Any = None
        self._app: FastAPI | None = None
        self._entry: ASGIApp | None = None

    @property
    def can_build(self) -> bool:
        return self._gateway.model_config.runner_type == "generate" or bool(self._gateway.engine_core.infos)

    def set_server(self, server: Any) -> None:
        """The server that the ingress has, instead of none; see :func:`model_app`."""
        self._server = server
        if self._app is not None:
            self._app.state.server = server

    async def build(self) -> FastAPI:
        """The app; made at the first call."""
        async with self._building:
            if self._app is None:
                app = await model_app(self._gateway, self._settings, self._max_members)
                if self._settings.control_routes or self._generator.adapter_folder is not None:
                    # Ahead of vLLM's own, which know one engine and one ingress process.
                    app.router.routes[:0] = adapter_routes(self._generator).routes
                app.state.server = self._server or app.state.server
                self._app, self._entry = app, InOurWords(FastPath(app))
        return self._app

    def controls(self, scope: Scope) -> bool:
        """Whether a request is to a control route that acts on this model alone."""
        routes = () if self._app is None else self._app.router.routes
        return any(
            getattr(route, "path", None) not in OPEN_ROUTES | FOR_ALL_MODELS and route.matches(scope)[0] is Match.FULL
            for route in routes
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._entry is None and self.can_build:
            await self.build()
        await (self._entry or await answer_error(None, self._gateway.refusal()))(scope, receive, send)


def over_all_models(apps: Mapping[str, ModelApp], generator: Generator) -> ASGIApp:
    """One app for all of them."""

    def controls(scope: Scope) -> bool:
        return any(app.controls(scope) for app in apps.values())

    dispatched = ModelDispatch(apps, generator.model_of, lambda: generator.served, controls)
    return Tiered(Limited(dispatched, generator))


class _Server(uvicorn.Server):
    """Signals are the process owner's business, not the ingress'."""

    def install_signal_handlers(self) -> None: ...


async def model_app(gateway: Gateway, settings: Http, max_members: int = MAX_MEMBERS) -> FastAPI:
    """vLLM's API app over one gateway, cut down to the open routes."""
    arguments = api_arguments(gateway)
    tasks = await gateway.get_supported_tasks()
    app = build_app(arguments, tasks, gateway.model_config)
    app.title = "hycluster"
    await init_app_state(gateway, app.state, arguments, tasks)
    if (completions := app.state.openai_serving_completion) is not None:
        patch_completions(completions, gateway.check_admission)
    if (messages := app.state.anthropic_serving_messages) is not None:
        patch_messages(messages)
        patch_message_stream(messages, anthropic_type)
    if (responses := app.state.openai_serving_responses) is not None:
        patch_responses(responses)
        patch_response_stream(responses)
        patch_tools(responses, gateway.model.name)
    for handler in (app.state.openai_serving_chat, completions, messages, responses):
        if handler is not None:
            patch_streams(handler, gateway.checking, gateway.check)
    app.include_router(_model_cards(app.state.openai_serving_models))
    # vLLM's app asks this mapping for a name that is no model's. What it finds there has the name that engines know.
    app.state.openai_serving_models.lora_requests = gateway.lora_requests
    called_as_by_callers(app.state.openai_serving_models)
    # Told to exit when an engine is lost for good; what serves without one of its own needs not.
    app.state.server = SimpleNamespace(should_exit=False)
    if not settings.control_routes:
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in OPEN_ROUTES]
    quick_to_validate(app.router.routes, max_members)
    app.add_exception_handler(HyclusterError, answer_error)
    app.add_exception_handler(GenerationError, answer_generation_error)
    for kind in (fastapi.HTTPException, starlette.exceptions.HTTPException):
        app.add_exception_handler(kind, answer_http_error)
    for unreadable in (AttributeError, LookupError, RecursionError):
        app.add_exception_handler(unreadable, answer_unreadable)
    # Counted for all apps at once, and with what never reaches one: ``Counted``.
    app.user_middleware[:] = [
        each for each in app.user_middleware if getattr(each, "cls", None) is not PrometheusInstrumentatorMiddleware
    ]
    # vLLM hands the app over with its middleware built; have it built again, with the handler.
    app.middleware_stack = None
    return app


def api_arguments(gateway: Gateway) -> Namespace:
    """Arguments of vLLM's API server: its defaults, the model's own, the settings' ``api``."""
    arguments = copy.copy(gateway.api)
    # The whole ingress' affair; see ``in_form``.
    arguments.allowed_origins = []
    # The page's scripts come with vLLM, or it would be blank where there is no internet.
    arguments.enable_offline_docs = True
    # What a prompt found in the KV cache, as OpenAI's own API tells it.
    arguments.enable_prompt_tokens_details = True
    return arguments


def _model_cards(models: Any) -> APIRouter:
    """``GET /v1/models/NAME``, which vLLM has not: what ``/v1/models`` says of one, be it a model or an adapter."""
    routes = APIRouter()

    @routes.get(f"{MODELS}/{{name:path}}")
    async def retrieve(name: str) -> JSONResponse:
        cards = {card.id: card for card in (await models.show_available_models()).data}
        if name not in cards:
            raise UnknownModel(name, usable(cards))
        return JSONResponse(cards[name].model_dump())

    return routes
