"""vLLM's control routes for sleep, over a pool of real engines on a CPU."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

from tests.integration.conftest import eventually
from tests.integration.featured import TINY, Featured

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ASKED = {"model": TINY, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
MODEL = {"model": TINY}


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_pool_that_sleeps_answers_when_it_is_woken(featured: Featured, level: int) -> None:
    """On a CPU vLLM frees nothing at any level: it is a pause, and what was asked meanwhile is answered after it."""
    with httpx.Client(base_url=featured.served.http, timeout=120) as ingress:

        def sleeps() -> bool:
            return bool(ingress.get("/is_sleeping", params=MODEL).raise_for_status().json()["is_sleeping"])

        def ask() -> Any:
            answer = httpx.post(f"{featured.served.http}/v1/completions", json=ASKED, timeout=120)
            return answer.raise_for_status().json()["choices"][0]["text"]

        before, answers = ask(), []
        assert not sleeps()
        ingress.post("/sleep", params={**MODEL, "level": level}).raise_for_status()
        try:
            assert sleeps()
            asking = threading.Thread(target=lambda: answers.append(ask()))
            asking.start()
            asking.join(1)
            assert asking.is_alive()
            # Nothing is wrong with it, and others are served.
            assert ingress.get("/health", params=MODEL).status_code == 200
        finally:
            assert ingress.post("/wake_up", params=MODEL).raise_for_status().json()["status"] == "awake"
        eventually(lambda: answers, 60, "what was asked in its sleep is answered")
        assert answers == [before]
        assert not sleeps()
