"""The page's routes, asked in process; ``test_browser.py`` looks at them as people do."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
import pytest_asyncio

from hycluster.page.app import with_page
from hycluster.settings.ingress import Http
from hycluster.state.usage_state import HOUR_S, UsageState, span_usage
from tests.page.stand_in import EVIL, EVIL_TIMELINE, StandInIngress, evil_state, evil_usage
from tests.state.made import BIG, NOW, made_usage

PAGES = ("/ui", "/ui/jobs", "/ui/usage", "/ui/requests", "/ui/playground")


class Document(HTMLParser):
    """Which elements a page has, with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def cluster() -> StandInIngress:
    return StandInIngress()


@pytest_asyncio.fixture
async def page(cluster: StandInIngress) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(cluster.app), base_url="http://here") as client:
        yield client


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_is_whole_without_a_script(page: httpx.AsyncClient, path: str) -> None:
    answer = await page.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    document = Document(answer.text)
    assert [found["lang"] for found in document.named("html")] == ["en"]
    assert len(document.named("h1")) == len(document.named("main")) == 1
    assert [link["href"] for link in document.named("a") if link.get("aria-current") == "page"] == [path]
    assert "degraded" in document.text
    ids = [attributes["id"] for _, attributes in document.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for table in document.named("table"):
        assert table is not None
    assert len(document.named("caption")) == len(document.named("table"))


@pytest.mark.parametrize("path", [*PAGES, "/hycluster/status", "/ui/static/page.js", "/ui/static/none", "/ui/"])
async def test_what_a_browser_is_told_to_allow(page: httpx.AsyncClient, path: str) -> None:
    headers = (await page.get(path)).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self'",
        "connect-src": "'self'",
        "form-action": "'self'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("path", [*PAGES, "/ui/requests?id=one"])
async def test_nothing_inline_and_nothing_from_elsewhere(
    cluster: StandInIngress, page: httpx.AsyncClient, path: str
) -> None:
    cluster.timelines["one"] = {"id": "one", "spans": [{"name": "chat", "start_s": 0, "duration_s": 1}]}
    document = Document((await page.get(path)).text)
    for tag, attributes in document.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "action"):
            if name in attributes:
                assert (attributes[name] or "").startswith(("/", "#")), (tag, attributes)
    assert [script.get("src") for script in document.named("script")] == ["/ui/static/page.js"]
    assert not document.named("style")


async def test_assets(page: httpx.AsyncClient) -> None:
    for name, kind in (("page.js", "text/javascript"), ("page.css", "text/css"), ("icon.svg", "image/svg+xml")):
        answer = await page.get(f"/ui/static/{name}")
        assert answer.headers["content-type"].partition(";")[0] == kind
        assert answer.content
    assert (await page.get("/ui/static/none")).status_code == 404
    for name in ("..%2fapp.py", "%2fetc%2fpasswd", "templates/base.html.jinja"):
        assert (await page.get(f"/ui/static/{name}")).text == "the models' app"
    assert (await page.get("/ui/", follow_redirects=False)).headers["location"] == "/ui"


async def test_the_state_as_json_is_what_the_page_shows(cluster: StandInIngress, page: httpx.AsyncClient) -> None:
    assert (await page.get("/hycluster/status")).json() == json.loads(json.dumps(cluster.state.told()))
    text = Document((await page.get("/ui")).text).text
    for part in (BIG, "2 of 4 replicas", "0f1e2d3c", "94 %", "44,141", "weights", "98.99 %", "lost: has said nothing"):
        assert part in text, part
    text = Document((await page.get("/ui/jobs")).text).text
    for part in (
        "in progress",
        "31,262 of 48,000 requests, 12 failed",
        "waits for online traffic",
        "line 3: body.model",
    ):
        assert part in text, part


async def test_usage(cluster: StandInIngress, page: httpx.AsyncClient) -> None:
    text = Document((await page.get("/ui/usage")).text).text
    for part in (
        "acme/search", "3,412", "3.1 M", "44 %", "614,160", "12.31 USD", "0.0021 USD", "13.15 USD", "All", "256.90 USD",
        "97,400 of 100,000 tokens a minute", "461.00 USD of 500.00 USD a month", "notebook key_5b2e",
        f"tenant, model {BIG}", "4 of 60 requests a minute",
    ):  # fmt: skip
        assert part in text, part
    # The nearest first.
    assert text.index("97,400 of") < text.index("461.00 USD of") < text.index("27 of 32") < text.index("4 of 60")
    cluster.usage = UsageState(0, "usd")
    assert "is being read" in Document((await page.get("/ui/usage")).text).text
    cluster.usage = UsageState(NOW, "usd", (span_usage(HOUR_S, ()),), problems=("the database is away",))
    text = Document((await page.get("/ui/usage")).text).text
    for part in ("the database is away", "No request has ended in the last hour", "Nobody has a limit"):
        assert part in text, part


async def test_there_is_no_ledger(cluster: StandInIngress) -> None:
    app = with_page(cluster.watch, cluster.app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        assert "There is no usage ledger" in (await client.get("/ui/usage")).text


async def test_all_else_goes_past_it(cluster: StandInIngress, page: httpx.AsyncClient) -> None:
    for method, path in (
        ("POST", "/v1/completions"),
        ("GET", "/metrics"),
        ("GET", "/uix"),
        ("GET", "/ui/nothing"),
    ):
        assert (await page.request(method, path)).text == "the models' app"
    assert [path for path, _ in cluster.asked] == ["/v1/completions", "/metrics", "/uix", "/ui/nothing"]
    assert (await page.post("/ui")).status_code == 405


@pytest.mark.parametrize("path", [*PAGES, "/ui/requests?id=evil", f"/ui/requests?id={httpx.QueryParams({'': EVIL})}"])
async def test_what_others_say_is_text(cluster: StandInIngress, page: httpx.AsyncClient, path: str) -> None:
    tags = sorted({tag for tag, _ in Document((await page.get(path)).text).elements})
    cluster.state = evil_state(cluster.state)
    cluster.usage = evil_usage(made_usage())
    cluster.timelines["evil"] = EVIL_TIMELINE
    cluster.slowest = [{"id": EVIL, "model": EVIL, "status": EVIL, "slowest_stage": EVIL, "duration_s": EVIL}, EVIL]
    text = (await page.get(path)).text
    document = Document(text)
    assert "<script>alert" not in text
    assert not document.named("img")
    assert len(document.named("script")) == 1
    assert "49" not in document.text.replace("3,449", "")
    assert set(document.elements[0][1]) == {"lang"}
    # All that is there besides is what shows a timeline and a list of requests.
    known = {"a", "caption", "code", "dd", "details", "div", "dl", "dt", "h3", "option", "p", "rect", "section", "span"}
    known |= {"li", "ul", "summary", "svg", "table", "tbody", "td", "th", "thead", "tr"}
    assert {tag for tag, _ in document.elements} - set(tags) <= known
    if path == "/ui/requests?id=evil":
        assert EVIL in document.text


async def test_why(cluster: StandInIngress, page: httpx.AsyncClient) -> None:
    cluster.timelines["a/b c"] = {
        "id": "a/b c",
        "model": "m",
        "status": "ok",
        "started": NOW,
        "duration_s": 2.0,
        "spans": [
            {"name": "queued", "process": "r0", "start_s": 0.5, "duration_s": 1.0, "attributes": {"waiting": 12}},
        ],
        "events": [{"name": "routed", "at_s": 0.25, "attributes": {"score": 7, "candidates": {"r0": 5, "r1": 7}}}],
    }
    cluster.slowest = [{"id": "a/b c", "model": "m", "duration_s": 2.0, "ttft_s": 1.5, "slowest_stage": "queued"}]
    answer = await page.get("/ui/requests", params={"id": "a/b c"}, headers={"Authorization": "Bearer key"})
    document = Document(answer.text)
    for part in (
        "queued",
        "r0",
        "waiting",
        "500 ms",
        "1.0 s",
        "routed",
        "250 ms",
        "score 7",
        "candidates r0: 5, r1: 7",
    ):
        assert part in document.text, part
    lane = next(each for each in document.named("rect") if each.get("class") == "good")
    assert (lane["x"], lane["width"]) == ("150.0", "300.0")
    assert "/ui/requests?id=a/b%20c" in [link["href"] for link in document.named("a")]
    # Whoever may not ask the route itself learns nothing by the page.
    assert {key for path, key in cluster.asked} == {"Bearer key"}


async def test_nothing_is_known_of_a_request(cluster: StandInIngress, page: httpx.AsyncClient) -> None:
    answer = await page.get("/ui/requests?id=gone")
    assert answer.status_code == 404
    text = Document(answer.text).text
    assert "Nothing is known of a request gone" in text
    assert "keeps no timelines" in text
    cluster.slowest = []
    assert "No request has ended yet" in (await page.get("/ui/requests")).text


@pytest.mark.parametrize(
    ("settings", "has_page"),
    [
        ({}, True),
        ({"host": "localhost"}, True),
        ({"host": "::1"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "gateway.example"}, False),
        ({"host": "0.0.0.0", "ui": True}, True),
        ({"ui": False}, False),
    ],
)
def test_who_is_served_the_page(settings: dict[str, Any], has_page: bool) -> None:
    assert Http(**settings).serves_ui is has_page
