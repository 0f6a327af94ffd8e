"""What the fuzz tests share: how much they try, which answers are right, and what must be as before when they are done.

``HYCLUSTER_FUZZ_EXAMPLES=200`` tries 200 inputs in the place of each 8, with another seed at every run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import psutil
from hypothesis import HealthCheck, Phase, settings

from hycluster.client import Client
from hycluster.core import Sampling
from tests.families import words_below
from tests.integration.conftest import SIMULATED, TINY, Served, eventually, replicas

ASKED = os.environ.get("HYCLUSTER_FUZZ_EXAMPLES")
EXAMPLES = int(ASKED or 8)
# One with a simulated engine, one with a real one.
MODELS = [SIMULATED, TINY]
# How long any call may take, whatever it holds.
BOUND_S = 60.0

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=ASKED is None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def check_answer(answer: httpx.Response, what: object = "") -> None:
    """No 5xx but a 503 that says of itself whose it is, and an error in OpenAI's (or Anthropic's) form."""
    said = f"{answer.status_code} {answer.text[:500]!r} to {str(what)[:3000]}"
    assert answer.status_code < 500 or (answer.status_code == 503 and "x-hycluster-error" in answer.headers), said
    assert "Traceback" not in answer.text, said
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        assert answer.json()["error"]["message"], said


@dataclass(frozen=True)
class Footprint:
    """Memory and open files of the processes that serve: ingress and replicas, all of one cluster.

    Attributes:
        pids: of these processes.
    """

    pids: frozenset[int]
    rss_mib: dict[str, float]
    files: dict[str, int]


def footprint(served: Served) -> Footprint:
    port = int(served.http.rpartition(":")[2])
    ingress = next(
        psutil.Process(connection.pid)
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid
    )
    raylet = ingress.parent()
    assert raylet is not None
    serving = {
        process: "".join(words)
        for process, words in words_below(raylet.pid).items()
        if "ServeReplica:hycluster" in "".join(words)
    }
    assert ingress in serving
    # While Ray calls a method of an actor's, its process' title has that behind a point.
    names = {process.pid: f"{title.partition('.')[0]} ({process.pid})" for process, title in serving.items()}
    return Footprint(
        frozenset(names),
        {names[p.pid]: p.memory_info().rss / 2**20 for p in serving},
        {names[p.pid]: p.num_fds() for p in serving},
    )


def idle(model: str) -> bool:
    """Its engines have nothing to do and hold no KV blocks."""
    return all(not r.load.running and not r.load.waiting and r.load.kv_usage == 0 for r in replicas(model))


def frees_soon(hang_up: Callable[[], object], model: str) -> None:
    """What a caller had is free within a second of its going, and told within half of one more. A busy machine may be
    late, but not each time.
    """
    late_s: list[float] = []
    while len(late_s) < 3:
        hang_up()
        began_s = time.monotonic()
        eventually(lambda: idle(model), 60, f"the engines of {model} are idle again")
        late_s.append(time.monotonic() - began_s)
        if late_s[-1] < 1.6:
            return
    raise AssertionError(f"idle again after {late_s} s")


def wait_until_idle(timeout_s: float) -> None:
    eventually(lambda: all(map(idle, MODELS)), timeout_s, f"the engines of {MODELS} are idle again")


@contextmanager
def unharmed(served: Served) -> Iterator[None]:
    """Afterwards the same processes serve, at both ingresses, and their engines are idle."""
    before = footprint(served)
    yield
    wait_until_idle(60)
    assert footprint(served).pids == before.pids, "a process died"
    assert httpx.get(f"{served.http}/health", timeout=60).status_code == 200
    with Client(served.grpc) as client:
        for model in MODELS:
            body = {"model": model, "prompt": "hello", "max_tokens": 3, "ignore_eos": True}
            answer = httpx.post(f"{served.http}/v1/completions", json=body, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 3, answer.text
            said = client.generate(model=model, prompt="hello", sampling=Sampling(max_tokens=3, ignore_eos=True))
            assert said.outputs[0].finish_reason == "length"
