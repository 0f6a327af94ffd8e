"""An ingress process: both ingresses over one generator, on an event loop of its own.

A Ray Serve deployment, so Serve starts, places, watches and replaces it; callers come straight in by
its own ports. Its own thread and loop keep the streams clear of Serve's control traffic.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import ipaddress
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from starlette.types import ASGIApp

from hycluster import logs
from hycluster.admin_api.app import open_administration, with_admin
from hycluster.auth.caller import calling
from hycluster.auth.guard import Guard, open_guard
from hycluster.directory.directory import FORGET_AFTER_S, IngressReport, Overview, Survey, open_directory
from hycluster.errors import HyclusterError, SettingsError, Unavailable, start_failure
from hycluster.imports import without_collector
from hycluster.ingress.ending import ending
from hycluster.ingress.grpc import serve_grpc
from hycluster.ingress.ports import TURNED_AWAY_AFTER_S, let_in, turn_away
from hycluster.ingress.starting import StartingIngress, starting_ingress
from hycluster.ingress.tls import Certificate, open_certificate
from hycluster.ledger.books import books_of
from hycluster.ledger.keeper import open_ledger
from hycluster.limits.book import Name
from hycluster.limits.limiter import Limiter, open_limiter
from hycluster.observe.export import Export
from hycluster.observe.ledger import ledger_metrics
from hycluster.observe.request_log import log_requests
from hycluster.observe.scrape import Neighbours
from hycluster.observe.timelines import recorder
from hycluster.page.app import with_page
from hycluster.pool_health import PoolHealth
from hycluster.settings.settings import Settings
from hycluster.state.cluster_state import BatchState, ClusterState
from hycluster.state.usage_watch import UsageWatch
from hycluster.state.watch import StateWatch
from hycluster.traffic import ModelTraffic
from hycluster.watchdog import Watchdog

if TYPE_CHECKING:
    from hycluster.admin_api.administration import Administration
    from hycluster.gateway.generation import Generator

logger = logging.getLogger(__name__)

# What an answer that was ended may take until its caller has heard so.
LAST_WORDS_S = 2.0
# An ingress process whose event loop is held up for so long is killed: all its streams stand still.
SILENT_AFTER_S = 60.0
TRAFFIC_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class IngressAddresses:
    """Where an ingress process listens."""

    http: str
    grpc: str


def reached(host: str, port: int, node: str, node_ip: str) -> IngressReport:
    """Where a port is reached from within the cluster that listens on ``host``."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            address = ipaddress.ip_address(node_ip)
        host = f"[{address}]" if address.version == 6 else str(address)
        return IngressReport(node, f"{host}:{port}", not address.is_loopback)
    # "localhost", or a name that this machine has for one of its addresses.
    return IngressReport(node, f"{host}:{port}", False)


def _traffic(generator: Generator) -> dict[str, ModelTraffic]:
    """By model, what callers got here over the last hour."""
    return {name: each.traffic.report() for name, each in generator.gateways.items()}


class IngressProcess:
    """Opens when a model can be served; the others follow by themselves.

    Args:
        directory: name of the directory to follow.
        others: Serve's handles of the models' deployments and of the batch executor: they make them part of the
            application; no request goes through them.

    Raises:
        RuntimeError: the ingress process could not open (from ``addresses`` and ``check_health``).
    """

    def __init__(self, settings: Settings, directory: str, *others: Any) -> None:
        logs.settle("ingress")
        self._settings = settings
        self._directory = directory
        self._id = secrets.token_hex(8)
        self._opened: Future[IngressAddresses] = Future()
        self._stopping: asyncio.Event | None = None
        self._serving: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._able = False
        self._state: StateWatch | None = None
        self._usage: UsageWatch | None = None
        self._administration: Administration | None = None
        self._watchdog = Watchdog(silent_after_s=SILENT_AFTER_S)
        recorder.process = "ingress"
        open_directory(directory)
        self._thread = threading.Thread(target=self._run, name="ingress", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        import uvloop

        try:
            uvloop.run(self._serve())
        except HyclusterError as error:
            self._fail(start_failure(error))
        except asyncio.CancelledError:
            self._fail(start_failure(Unavailable("stopped before it was open")))
        except BaseException as error:
            logger.exception("the ingress process broke")
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._opened.done():
            self._opened.set_exception(error)

    async def _serve(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._serving = asyncio.current_task()
        self._state = StateWatch(self._survey, self._pools, self._batches(), self._settings.objectives)
        async with contextlib.AsyncExitStack() as stack:
            export = Export(
                recorder,
                self._settings.tracing,
                instance=ray.get_runtime_context().get_actor_id() or "",
                attributes={"server.address": self._settings.http.host, "server.port": self._settings.http.port},
            )
            stack.push_async_callback(asyncio.to_thread, export.close)
            log_requests(recorder, self._settings.logs)
            stack.push_async_callback(self._state.close)
            keeper = await stack.enter_async_context(open_ledger(self._settings))
            if keeper is not None:
                ledger_metrics.watch("", keeper)
            guard = await stack.enter_async_context(open_guard(self._settings.auth))
            self._administration = await stack.enter_async_context(
                open_administration(self._settings.auth, books_of(self._settings))
            )
            if (books := books_of(self._settings)) is not None:
                keyring = guard.keyring if guard else None
                self._usage = UsageWatch(books, keyring, self._limits_used, self._settings.auth.currency)
                stack.push_async_callback(self._usage.close)
            certificate = await stack.enter_async_context(open_certificate(self._settings.auth.tls))
            starting: StartingIngress | None = None
            # Where ingress processes share their ports, callers would come to one that can't serve in place of one that
            # can. A port in use is that of a predecessor; if it is somebody else's, opening it in the end says so.
            if self._settings.ingress.replicas == 1:
                with contextlib.suppress(SettingsError):
                    starting = await stack.enter_async_context(
                        starting_ingress(self._settings, self._pools, self._names, self._page, guard, certificate)
                    )
            limiter = await stack.enter_async_context(
                open_limiter(guard.keyring if guard else None, partial(open_directory, self._directory))
            )
            await self._serve_models(starting, guard, certificate, limiter)

    async def _pools(self) -> dict[str, PoolHealth]:
        """What the directory knows of the replicas, while there is no gateway to ask."""
        known = Overview()
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            async with asyncio.timeout(FORGET_AFTER_S):
                known = await open_directory(self._directory).overview.remote()
        return {
            m.name: PoolHealth(known.ready.get(m.name, 0), m.replicas.count, m.sleeps, known.troubles.get(m.name))
            for m in self._settings.models
        }

    async def _survey(self) -> Survey:
        survey: Survey = await open_directory(self._directory).survey.remote()
        return survey

    async def _limits_used(self) -> dict[Name, int]:
        used: dict[Name, int] = await open_directory(self._directory).limits_used.remote()
        return used

    def _batches(self) -> Callable[[], list[BatchState]] | None:
        """Reads the batches, if there are to be any."""
        if (settings := self._settings.batches) is None:
            return None

        def read() -> list[BatchState]:
            from hycluster.batch_api.batch_states import batch_states
            from hycluster.batch_api.store import Store

            # Whoever has it looked at sees the whole.
            with calling(None):
                return batch_states(Store(settings))

        return read

    def _page(self, others: ASGIApp) -> ASGIApp:
        """Puts the page and the state beside the other routes, if they are to be seen."""
        assert self._state is not None
        if not self._settings.http.serves_ui:
            return others
        return with_page(self._state.now, others, self._usage.now if self._usage else None)

    async def _names(self) -> list[str] | None:
        """All that a request may name, with the adapters that were loaded while other ingress processes served; None
        while the directory does not say."""
        try:
            async with asyncio.timeout(FORGET_AFTER_S):
                known = await open_directory(self._directory).models.remote()
        except (ray.exceptions.RayError, TimeoutError):
            return None
        given = [name for m in self._settings.models for name in (m.name, *(adapter.name for adapter in m.adapters))]
        return [*given, *(name for name in known if name not in given)]

    async def _serve_models(
        self,
        starting: StartingIngress | None,
        guard: Guard | None,
        certificate: Certificate | None,
        limiter: Limiter | None,
    ) -> None:
        # Half a minute on a slow machine, and callers are to be told meanwhile.
        with without_collector():
            await asyncio.to_thread(importlib.import_module, "hycluster.ingress.http")
        from vllm.envs import enable_envs_cache

        from hycluster.gateway.generation import open_generators
        from hycluster.ingress.http import serve_http
        from hycluster.responses.process import ServedResponses

        settings, responses = self._settings, ServedResponses(self._settings)
        node = ray.get_runtime_context().get_node_id()
        neighbours = Neighbours(f"{node[:16]}-{settings.http.port}")
        assert self._stopping is not None
        assert self._state is not None
        async with (
            neighbours.told(),
            open_generators(
                self._directory,
                settings.models,
                router=settings.router,
                admission=settings.admission,
                # However long that takes: callers hear meanwhile what is missing.
                wait_s=None,
            ) as generator,
            ending(generator, guard if settings.auth.end_streams else None),
        ):
            generator.limiter = limiter
            generator.adapter_folder = settings.auth.adapter_folder
            http = await serve_http(
                generator,
                settings.http,
                max_members=settings.admission.max_members,
                guard=guard,
                certificate=certificate,
                around=self._beside_models,
                page=self._page,
                before_models=responses.before,
                metrics=neighbours.families,
                reuse_port=True,
                drain_timeout_s=settings.drain_timeout_s + LAST_WORDS_S,
                sock=await starting.hand_over(generator) if starting else None,
            )
            grpc = (
                starting.grpc
                if starting
                else await serve_grpc(
                    generator,
                    settings.grpc,
                    max_members=settings.admission.max_members,
                    guard=guard,
                    certificate=certificate,
                    reuse_port=True,
                )
            )
            # vLLM, torch and Ray leave a heap that a full collection takes a tenth of a second to walk; none of it
            # will ever be garbage.
            gc.collect()
            gc.freeze()
            # For each token of each answer vLLM looks into the environment, which no longer changes.
            enable_envs_cache()
            self._state.open(generator.pools)
            self._opened.set_result(
                IngressAddresses(
                    f"{'https' if certificate else 'http'}://{settings.http.host}:{http.port}",
                    f"{settings.grpc.host}:{grpc.port}",
                )
            )
            directory: Any = open_directory(self._directory)
            here, told_s = reached(settings.grpc.host, grpc.port, node, ray.util.get_node_ip_address()), -math.inf
            while not self._stopping.is_set():
                self._watchdog.beat()
                self._able = await generator.ready()
                if self._able:
                    # No answer is waited for: it is said again.
                    directory.open_ingress.remote(here)
                if time.monotonic() - told_s >= TRAFFIC_EVERY_S:
                    told_s = time.monotonic()
                    directory.tell_traffic.remote(self._id, _traffic(generator))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), 0.5)
            self._able = False
            # A drain may take longer than a beat may be late.
            self._watchdog.close()
            ports = http.port, grpc.port
            turn_away(*ports)
            await let_in(ports, TURNED_AWAY_AFTER_S)
            closing = asyncio.gather(
                http.stop(),
                grpc.stop(settings.drain_timeout_s + LAST_WORDS_S),
                # What is left is given to other ingress processes before its answer is ended here.
                responses.close(max(0.0, settings.drain_timeout_s - LAST_WORDS_S)),
                # Until both have closed their sockets, somebody may still come.
                let_in(ports, TURNED_AWAY_AFTER_S),
            )
            late = not (await asyncio.wait([closing], timeout=settings.drain_timeout_s))[0]
            if late:
                await generator.end(Unavailable("the server shut down before the answer was complete"))
            await closing

    def _beside_models(self, app: ASGIApp) -> ASGIApp:
        """Puts the admin API's and the Batch API's routes beside the models', if there are to be any."""
        settings = self._settings
        if settings.batches is not None:
            from hycluster.batch_api.routes import with_batches

            app = with_batches(settings.batches, settings.http, app)
        return with_admin(self._administration, settings.http, app)

    async def addresses(self) -> IngressAddresses | None:
        """Where this ingress process listens; None while no request would succeed.

        Raises:
            RuntimeError: it could not open.
        """
        if not self._opened.done():
            return None
        addresses = self._opened.result()
        return addresses if self._able else None

    async def cluster_state(self) -> ClusterState:
        """The state of the cluster, as this ingress process knows it."""
        assert self._loop is not None
        assert self._state is not None
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._state.now(), self._loop))

    async def check_health(self) -> None:
        """Called by Ray Serve; raising makes it replace this ingress process. Before it is open: waits for that.

        Serve calls it once before it takes an ingress process for running, and stops a predecessor only then.
        """
        await asyncio.shield(asyncio.wrap_future(self._opened))
        if not self._thread.is_alive():
            raise RuntimeError("the ingress process's thread has ended")

    async def __del__(self) -> None:
        """Ray Serve awaits this when it stops an ingress process: finish what is in flight."""
        if self._loop is not None and self._stopping is not None and self._serving is not None:
            # One that is still waiting for replicas has nothing to finish.
            end = self._stopping.set if self._opened.done() else self._serving.cancel
            with contextlib.suppress(RuntimeError):  # its loop has ended already
                self._loop.call_soon_threadsafe(end)
            await asyncio.to_thread(self._thread.join, self._settings.drain_timeout_s + 10)
