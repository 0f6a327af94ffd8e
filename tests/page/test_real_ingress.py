"""The page before the real HTTP ingress, vLLM's app over a gateway, with a simulated engine: what the playground is
answered, and what the gateway counts."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver.common.by import By

from hycluster.page.app import with_page
from hycluster.settings.ingress import Http
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from hycluster.state.watch import StateWatch
from tests.page.browsing import CHROMIUM, DRIVER, browsing, complaints
from tests.page.browsing import until as until_seen
from tests.simulated_pool import SimulatedPool
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

ENGINE = Simulated(vocab_size=256, max_model_len=512, decode_token_s=0.002)
CHAT = {
    "model": "org/tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_completion_tokens": 8,
    "ignore_eos": True,
}


async def serving(model: Model, look: Callable[[str, Any, SimulatedPool], Any]) -> None:
    """Has ``look`` see an ingress with the page, its gateway, and the pool behind it."""
    from hycluster.gateway.generation import Generator
    from hycluster.gateway.opening import open_gateway
    from hycluster.ingress.http import serve_http

    with SimulatedPool(ENGINE, 1) as pool:
        directory = pool.directory(model)
        async with open_gateway(
            model, directory, router=Router(), admission=Admission(max_requests=2), wait_s=60, metrics=True
        ) as gateway:
            generator = Generator({model.name: gateway})

            async def survey() -> Any:
                directory.known.tell_traffic("here", {model.name: gateway.traffic.report()})
                return directory.known.survey()

            watch = StateWatch(survey, generator.pools, None)
            watch.open(generator.pools)
            http = await serve_http(
                generator, Http(port=0), page=lambda app: with_page(watch.now, app), drain_timeout_s=1
            )
            try:
                await look(f"http://127.0.0.1:{http.port}", gateway, pool)
            finally:
                await http.stop()


@pytest.fixture
def model(tiny_model: Path) -> Model:
    return Model(name="org/tiny", source=str(tiny_model), simulated=ENGINE, engine={"max_model_len": 512})


async def test_what_callers_got_is_counted(model: Model) -> None:
    async def look(url: str, gateway: Any, pool: SimulatedPool) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            for _ in range(3):
                (await http.post("/v1/chat/completions", json=CHAT)).raise_for_status()
            state = (await http.get("/hycluster/status")).json()
            assert (state["state"], state["traffic"]["answered"], state["traffic"]["output_tokens"]) == ("ready", 3, 24)
            assert state["traffic"]["prompt_tokens"] > 0
            assert state["traffic"]["ttft_s"]["p99"] is not None
            assert [pool["replicas"][0]["id"] for pool in state["pools"]] == ["r0"]
            # Where their time went, by what the page asks of the ingress itself.
            page = (await http.get("/ui/requests")).text
            asked = await http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "a/b"})
            assert asked.headers["x-request-id"] == "a/b"
            found = await http.get("/ui/requests", params={"id": "a/b"})
            assert found.status_code == 200
            assert re.search(r"since (\d{4}-\d\d-\d\d )?\d\d:\d\d", found.text)
            assert {"prefill", "decode"} <= set(re.findall(r'<th scope="row">(\w+)<', found.text))
            assert 'href="/ui/requests?id=' in page
            # A caller who leaves, and one who finds no room.
            leaving = asyncio.create_task(
                http.post("/v1/chat/completions", json={**CHAT, "max_completion_tokens": 400})
            )
            await until(lambda: gateway.engine_core.requests_in_flight == 1)
            leaving.cancel()
            await until(lambda: gateway.traffic.online.cancelled == 1)
            full = await asyncio.gather(*(http.post("/v1/chat/completions", json=CHAT) for _ in range(20)))
            shed = sum(answer.status_code == 429 for answer in full)
            assert shed
            pool[0].die()
            await until(lambda: not gateway.able)
            assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 503
            # The page and the scrape are told the same.
            minutes = gateway.traffic.report().minutes.values()
            page_has = tuple(
                sum(getattr(minute, name) for minute in minutes)
                for name in ("answered", "shed", "unavailable", "cancelled", "failed")
            )
            series = [line for line in (await http.get("/metrics")).text.splitlines() if 'model="org/tiny"' in line]

            def scraped(name: str, *labels: str) -> float:
                return sum(
                    float(line.rpartition(" ")[2])
                    for line in series
                    if line.startswith(f"{name}{{") and all(label in line for label in labels)
                )

            assert page_has == (4 + 20 - shed, shed, 1, 1, 0)
            assert page_has == (
                scraped("vllm:request_success_total"),
                scraped("hycluster_requests_refused_total", 'reason="overloaded"'),
                scraped("hycluster_requests_refused_total", 'reason="unavailable"'),
                scraped("hycluster_requests_cancelled_total"),
                scraped("hycluster_requests_failed_total"),
            )

    await serving(model, look)


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver")
async def test_the_playground(model: Model) -> None:
    def in_a_browser(url: str) -> tuple[list[str], str, list[str]]:
        with browsing() as driver:
            driver.get(f"{url}/ui/playground")
            driver.find_element(By.ID, "prompt").send_keys("Say something.")
            driver.find_element(By.ID, "max_tokens").clear()
            driver.find_element(By.ID, "max_tokens").send_keys("16")
            driver.find_element(By.ID, "send").click()
            until_seen(lambda: driver.find_element(By.ID, "said").text in ("Answered.", "It failed."), 60)
            words = [each.text for each in driver.find_elements(By.CSS_SELECTOR, ".bubble .words")]
            figures = driver.find_element(By.CSS_SELECTOR, ".assistant p").text
            driver.get(f"{url}/ui")
            until_seen(lambda: driver.find_elements(By.CSS_SELECTOR, "rect.good"))
            return words, figures, complaints(driver)

    async def look(url: str, gateway: Any, pool: SimulatedPool) -> None:
        words, figures, said = await asyncio.to_thread(in_a_browser, url)
        assert words[0] == "Say something."
        assert "tokens" in figures
        assert "first token after" in figures
        assert not said
        assert sum(minute.answered for minute in gateway.traffic.report().minutes.values()) == 1

    await serving(model, look)
