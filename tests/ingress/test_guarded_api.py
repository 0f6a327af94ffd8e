"""The whole HTTP ingress behind its door: vLLM's own API app over a simulated engine, with all that is beside it."""

from __future__ import annotations

import contextlib
import re
import ssl
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from hycluster.auth.api_key import new_key
from hycluster.page.app import with_page
from hycluster.settings.auth import Tls
from hycluster.settings.ingress import Batches, Http
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from hycluster.state.cluster_state import ClusterState
from tests.auth.keyed import Keyed, keyed
from tests.ingress.test_tls import write_pair
from tests.simulated_pool import SimulatedPool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

ENGINE = Simulated(vocab_size=256, max_model_len=512, realtime=False)
OPEN = {"/health", "/ping"}
# Beside vLLM's own.
ADMIN = ("/metrics", "/ui", "/ui/jobs", "/ui/usage", "/ui/static/page.js", "/hycluster/status", "/hycluster/requests",
         "/v1/organization/projects")  # fmt: skip
BATCH = ("/v1/files", "/v1/batches")


@contextlib.asynccontextmanager
async def serving(folder: Path, tiny_model: Path, keys: Keyed) -> AsyncIterator[tuple[str, Any]]:
    """Where it is, and the routes of vLLM's app."""
    from hycluster.batch_api.routes import with_batches
    from hycluster.gateway.generation import Generator
    from hycluster.gateway.opening import open_gateway
    from hycluster.ingress.http import ModelApp, serve_http
    from hycluster.ingress.tls import Certificate

    async def nobody_looks() -> ClusterState:
        raise AssertionError("it was shown")

    write_pair(folder, "ingress")
    certificate = Certificate(Tls(certificate=str(folder / "cert.pem"), key=str(folder / "key.pem")))
    model = Model(name="org/tiny", source=str(tiny_model), simulated=ENGINE, engine={"max_model_len": 512})
    settings = Http(port=0, control_routes=True)
    with SimulatedPool(ENGINE, 1) as pool:
        async with open_gateway(
            model, pool.directory(model), router=Router(), admission=Admission(), wait_s=10
        ) as gateway:
            generator = Generator({model.name: gateway})
            ingress = await serve_http(
                generator,
                settings,
                guard=keys.guard,
                certificate=certificate,
                around=partial(with_batches, Batches(store=str(folder / "batches")), settings),
                page=partial(with_page, nobody_looks),
                drain_timeout_s=1,
            )
            try:
                yield f"https://127.0.0.1:{ingress.port}", (await ModelApp(gateway, settings, generator).build()).routes
            finally:
                await ingress.stop()


async def test_no_route_is_open_that_need_not_be(tmp_path: Path, tiny_model: Path) -> None:
    with keyed(tmp_path) as keys:
        async with serving(tmp_path, tiny_model, keys) as (url, routes):
            context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
            async with httpx.AsyncClient(base_url=url, verify=context) as http:
                await every_route_asks_who_calls(http, keys, routes)
            by_key = partial(client, url, context)
            await the_official_client_is_answered(by_key, keys)


async def every_route_asks_who_calls(http: httpx.AsyncClient, keys: Keyed, routes: Any) -> None:
    from hycluster.ingress.http import OPEN_ROUTES

    plain = {"authorization": f"Bearer {keys.key()}"}
    found = {(route.path, method) for route in routes for method in getattr(route, "methods", None) or {"GET"}}
    found |= {(path, "GET") for path in (*ADMIN, *BATCH)}
    assert len(found) > 40
    for path, method in sorted(found):
        if path in OPEN:
            continue
        asked = re.sub(r"{[^}]*}", "x", path) + ("/x" if path == "/static" else "")
        assert (await http.request(method, asked)).status_code == 401, (method, path)
        answer = await http.request(method, asked, headers=plain)
        closed = path in {*ADMIN, *BATCH} or path not in OPEN_ROUTES
        assert answer.status_code != 401, (method, path)
        assert (answer.status_code == 403) is closed, (method, path)
    health = await http.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "ready"})
    assert "org/tiny" not in (await http.get("/health?model=x")).text


def client(url: str, context: ssl.SSLContext, key: str) -> openai.AsyncOpenAI:
    theirs: Any = __import__(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])
    http = theirs.AsyncClient(verify=context)
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=http)


async def the_official_client_is_answered(by_key: Any, keys: Keyed) -> None:
    async with by_key(keys.key(models=["org/tiny"])) as allowed, by_key(keys.key(models=["other"])) as other:
        assert [model.id async for model in allowed.models.list()] == ["org/tiny"]
        assert [model.id async for model in other.models.list()] == []
        ask: Any = {"prompt": "hi", "max_tokens": 4, "extra_body": {"ignore_eos": True}}
        answer = await allowed.completions.create(model="org/tiny", **ask)
        assert answer.usage.completion_tokens == 4
        chunks = [chunk async for chunk in await allowed.completions.create(model="org/tiny", stream=True, **ask)]
        assert chunks[-1].choices[0].finish_reason == "length"
        for model in ("org/tiny", "other"):
            with pytest.raises(openai.NotFoundError) as error:
                await other.completions.create(model=model, **ask)
            assert error.value.code == "model_not_found"
            assert "served are 'org" not in error.value.message
    async with by_key(new_key()) as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.completions.create(model="org/tiny", **ask)
