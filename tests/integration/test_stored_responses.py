"""Responses at two ingress processes, one of which is killed: what it had answered the other one knows, and what it was
answering the other one answers."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

import httpx
import psutil
import pytest

from tests.families import titled_below
from tests.integration.conftest import Served, eventually
from tests.integration.featured import TINY, Featured

# The last of those that use this cluster: an ingress process is not there again when it ends.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

GREEDY = {"model": TINY, "temperature": 0, "ignore_eos": True}
# As many as its context holds: they take a few seconds.
LONG = GREEDY | {"input": "Once upon a time", "max_output_tokens": 450}


def at_each_ingress_process(served: Served, stack: contextlib.ExitStack) -> dict[int, httpx.Client]:
    """By its pid, a caller whose one connection is to it."""
    callers: dict[int, httpx.Client] = {}
    # The kernel deals connections out; in 2^40 times once, one process gets all.
    for _ in range(40):
        caller = stack.enter_context(httpx.Client(base_url=served.http, timeout=120))
        callers.setdefault(asked_process(caller), caller)
        if len(callers) == 2:
            return callers
    raise AssertionError(f"all connections are to {callers.keys()}")


def asked_process(caller: httpx.Client) -> int:
    here = caller.get("/health").extensions["network_stream"].get_extra_info("client_addr")
    (pid,) = {c.pid for c in psutil.net_connections("tcp") if c.raddr and tuple(c.raddr) == tuple(here[:2])}
    assert pid is not None
    return pid


def replica_pids(served: Served) -> set[int]:
    return {process.pid for process in titled_below(served.process.pid, ":replica-")}


def running(pid: int) -> bool:
    # It may go as one looks.
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def create(caller: httpx.Client, **asked: Any) -> dict[str, Any]:
    answer: dict[str, Any] = caller.post("/v1/responses", json=asked).raise_for_status().json()
    return answer


def text(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def test_an_ingress_process_is_killed_and_its_responses_go_on_at_the_other(featured: Featured) -> None:
    with contextlib.ExitStack() as stack:
        (killed, dying), (left, living) = at_each_ingress_process(featured.served, stack).items()
        replicas = replica_pids(featured.served)
        whole = text(create(living, **LONG))
        one = create(dying, **GREEDY, input="hello", max_output_tokens=8)
        background = create(dying, **LONG, background=True)
        unwanted = create(dying, **LONG, background=True)
        assert [each["status"] for each in (one, background, unwanted)] == ["incomplete", "in_progress", "in_progress"]
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: not running(killed), 30, "its process is gone")

        def now(response: dict[str, Any]) -> dict[str, Any]:
            found: dict[str, Any] = living.get(f"/v1/responses/{response['id']}").raise_for_status().json()
            return found

        assert text(now(one)) == text(one)
        items = living.get(f"/v1/responses/{one['id']}/input_items").raise_for_status().json()["data"]
        assert [item["content"] for item in items] == [[{"type": "input_text", "text": "hello"}]]
        two = create(living, **GREEDY, input="and now?", max_output_tokens=8, previous_response_id=one["id"])
        assert two["previous_response_id"] == one["id"]
        assert two["usage"]["input_tokens"] > one["usage"]["input_tokens"] + one["usage"]["output_tokens"]
        cancelled = living.post(f"/v1/responses/{unwanted['id']}/cancel").raise_for_status().json()
        assert cancelled["status"] == "cancelled"

        assert now(background)["status"] == "in_progress"
        ended = eventually(
            lambda: (found := now(background))["status"] != "in_progress" and found, 60, "the other one answers it"
        )
        assert (ended["status"], text(ended)) == ("incomplete", whole)
        assert now(unwanted)["status"] == "cancelled"
        assert asked_process(living) == left
        assert replica_pids(featured.served) == replicas
