"""``/health``: what it says in each state, and that it stands before whatever serves the rest."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hycluster.ingress.health import WithHealth
from hycluster.pool_health import PoolHealth, StartTrouble

WHOLE, HALF, NONE = PoolHealth(2, 2), PoolHealth(1, 2), PoolHealth(0, 2)
CUT_OFF = PoolHealth(0, 2, cut_off=True)
ASLEEP, WOKEN = PoolHealth(0, 0, wakes=True), PoolHealth(0, 1, wakes=True)


async def rest(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("the rest")(scope, receive, send)


def client(app: ASGIApp | None, **pools: PoolHealth) -> httpx.AsyncClient:
    async def ask() -> Mapping[str, PoolHealth]:
        return pools

    return httpx.AsyncClient(transport=httpx.ASGITransport(WithHealth(app, ask)), base_url="http://ingress")


@pytest.mark.parametrize(
    ("app", "a", "b", "status", "word"),
    [
        (rest, WHOLE, WHOLE, 200, "ready"),
        (rest, HALF, WHOLE, 200, "ready"),
        # A model that can't be served takes no other's callers away.
        (rest, NONE, WHOLE, 200, "degraded"),
        (rest, NONE, NONE, 503, "unavailable"),
        # Others may reach it: callers are to go to another ingress process.
        (rest, CUT_OFF, WHOLE, 503, "unavailable"),
        (rest, ASLEEP, WHOLE, 200, "ready"),
        (rest, WOKEN, WHOLE, 200, "ready"),
        (rest, ASLEEP, NONE, 200, "degraded"),
        (None, ASLEEP, WHOLE, 503, "starting"),
        (None, HALF, NONE, 503, "starting"),
        # Its replicas are there, and it is not open yet.
        (None, WHOLE, WHOLE, 503, "starting"),
    ],
)
async def test_what_it_says(app: ASGIApp | None, a: PoolHealth, b: PoolHealth, status: int, word: str) -> None:
    async with client(app, a=a, b=b) as http:
        answer = await http.get("/health")
    assert answer.status_code == status
    assert answer.json() == {
        "status": word,
        "models": {
            name: {"replicas_ready": pool.replicas_ready, "replicas_wanted": pool.replicas_wanted}
            | ({"wakes": True} if pool.wakes else {})
            for name, pool in {"a": a, "b": b}.items()
        },
    }


async def test_one_model_can_be_asked_for() -> None:
    async with client(rest, a=NONE, b=WHOLE) as http:
        answers = {name: await http.get("/health", params={"model": name}) for name in ("a", "b", "c")}
    assert {name: answer.status_code for name, answer in answers.items()} == {"a": 503, "b": 200, "c": 404}
    assert answers["b"].json() == {"status": "ready", "models": {"b": {"replicas_ready": 2, "replicas_wanted": 2}}}
    assert answers["c"].json()["error"]["message"] == "model: 'c' is not served here; served are 'a', 'b'"


async def test_it_says_why_a_model_does_not_start() -> None:
    trouble = StartTrouble(3, "EngineStartFailed", "no memory", 3.2)
    async with client(rest, a=PoolHealth(0, 1, trouble=trouble), b=WHOLE) as http:
        told = (await http.get("/health")).json()["models"]["a"]
    assert told == {
        "replicas_ready": 0, "replicas_wanted": 1, "failed_starts": 3, "reason": "no memory", "next_start_in_s": 4
    }  # fmt: skip
    async with client(None, a=PoolHealth(0, 1, trouble=trouble)) as http:
        message = (await http.post("/v1/completions", json={})).json()["error"]["message"]
    assert message.endswith("'a' has 0 of 1 replicas; 'a': 3 starts of replicas failed: no memory")


async def test_the_rest_is_served_by_the_app() -> None:
    async with client(rest, a=NONE) as http:
        assert (await http.get("/v1/models")).text == "the rest"
        assert (await http.post("/health")).text == "the rest"
        assert (await http.head("/health")).status_code == 503


async def test_before_there_is_an_app_callers_hear_what_is_missing() -> None:
    async with client(None, a=HALF) as http:
        answer = await http.post("/v1/completions", json={})
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "5"
    assert answer.json()["error"]["message"] == "the service is starting: 'a' has 1 of 2 replicas"
