"""Tenants on one real engine, in this process, behind both ingresses: what one asks tells another nothing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest

from hycluster.auth.caller import Caller
from hycluster.client import AsyncClient
from hycluster.settings.ingress import Grpc, Http
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.pool import Hardware
from hycluster.settings.simulated import Simulated
from tests.auth.keyed import Keyed, keyed
from tests.simulated_pool import SimulatedPool

if TYPE_CHECKING:
    from hycluster.engine.vllm import VllmEngine

# A first engine in a process imports what warns of third parties' sins.
pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.usefixtures("vllm_imported"),
    pytest.mark.filterwarnings("ignore"),
]  # fmt: skip

BLOCK_TOKENS = 32
SAID = "The quick brown fox jumps over the lazy dog, twice."
SYSTEM = [{"role": "system", "content": SAID}, {"role": "user", "content": "hi"}]
# By path, what is asked of it.
ASKED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": SAID, "max_tokens": 2},
    "/v1/chat/completions": {"messages": SYSTEM, "max_completion_tokens": 2},
    "/v1/responses": {"input": SAID, "max_output_tokens": 2, "store": False},
    "/v1/messages": {"messages": SYSTEM[1:], "system": SAID[::-1], "max_tokens": 2},
}


@dataclass
class Ingress:
    http: str
    grpc: str
    keys: Keyed
    engine: VllmEngine

    async def cached(self, key: str | None, path: str, **more: Any) -> int:
        """How many tokens of a prompt the engine had, by what the answer says."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(base_url=self.http, timeout=60, headers=headers) as http:
            answer = await http.post(path, json={"model": "tiny", **ASKED[path], **more})
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or usage
        return int(details.get("cached_tokens") or details.get("cache_read_input_tokens") or 0)


@contextlib.asynccontextmanager
async def opened(folder: Path, model: Path, *, guarded: bool) -> AsyncIterator[Ingress]:
    from hycluster.engine.vllm import VllmEngine
    from hycluster.gateway.generation import Generator
    from hycluster.gateway.opening import open_gateway
    from hycluster.ingress.grpc import serve_grpc
    from hycluster.ingress.http import serve_http

    settings = Model(
        name="tiny",
        source=str(model),
        engine={"max_model_len": 1024, "block_size": BLOCK_TOKENS},
        api={"enable_prompt_tokens_details": True},
        hardware=Hardware(kv_cache_gib=0.02),
    )
    kind: Any = lambda _: VllmEngine(settings, settings.source)  # noqa: E731
    with keyed(folder) as keys, SimulatedPool(cast(Simulated, None), 1, kind) as pool:
        async with open_gateway(
            settings, pool.directory(settings), router=Router(), admission=Admission(), wait_s=10
        ) as gateway:
            generator, guard = Generator({"tiny": gateway}), keys.guard if guarded else None
            http = await serve_http(generator, Http(port=0), guard=guard, drain_timeout_s=1)
            grpc = await serve_grpc(generator, Grpc(port=0), guard=guard)
            try:
                yield Ingress(
                    f"http://127.0.0.1:{http.port}", f"127.0.0.1:{grpc.port}", keys, cast(Any, pool[0].engine)
                )
            finally:
                await grpc.stop(0)
                await http.stop()


async def test_no_prefix_is_shared_by_two_projects(tmp_path: Path, tiny_model: Path) -> None:
    async with opened(tmp_path, tiny_model, guarded=True) as ingress:
        mine, also_mine, others = (ingress.keys.key(other=other) for other in (False, False, True))
        for path in ASKED:
            assert await ingress.cached(mine, path) == 0, path
            found = await ingress.cached(also_mine, path)
            assert found >= BLOCK_TOKENS, path
            assert await ingress.cached(others, path) == 0, path
            assert await ingress.cached(others, path) == found, path
        # What a caller sends sets its own users apart, and brings it nowhere else.
        scheduler: Any = ingress.engine._core.scheduler
        (account,) = scheduler._tenants._online._accounts.values()
        assert (account.tenant, account.weight) == ("acme", 1), "the engine knows whose it is"
        assert account.served > 0
        path = "/v1/chat/completions"
        salts = "acme", "acme search", _salt("search"), _salt("other")
        for salt in salts:
            for key in (mine, others):
                assert await ingress.cached(key, path, cache_salt=salt) == 0, salt
                assert await ingress.cached(key, path, cache_salt=salt) >= BLOCK_TOKENS, salt
        await ingress.cached(mine, path, cache_salt="of n", n=3)
        assert await ingress.cached(others, path, cache_salt="of n") == 0
        assert await ingress.cached(also_mine, path, cache_salt="of n") >= BLOCK_TOKENS
        prompt = "What is said by gRPC, which has no salt of its callers' own."
        for key, has in ((mine, False), (also_mine, True), (others, False), (others, True)):
            async with AsyncClient(ingress.grpc, api_key=key) as client:
                answer = await client.generate("tiny", prompt=prompt, max_tokens=2)
            assert answer.usage is not None
            assert (answer.usage.cached_tokens >= BLOCK_TOKENS) == has


async def test_where_nobody_is_asked_who_he_is_the_salt_is_the_callers(tmp_path: Path, tiny_model: Path) -> None:
    async with opened(tmp_path, tiny_model, guarded=False) as ingress:
        path = "/v1/completions"
        for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}):
            assert await ingress.cached(None, path, **salt) == 0
            assert await ingress.cached(None, path, **salt) >= BLOCK_TOKENS


def _salt(project: str) -> str:
    """What reaches the engine for this project."""
    from hycluster.auth.caller import calling, own_salt

    with calling(Caller("acme", project, "test")):
        salt = own_salt(None)
    assert salt is not None
    return salt
