"""The page in a real browser, at three sizes, by keyboard, under its policy, and against what others may say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.page.browsing import CHROMIUM, DRIVER, SIZES, browsing, complaints, listening, resize, until
from tests.page.stand_in import EVIL, EVIL_TIMELINE, StandInIngress, evil_state, evil_usage
from tests.state.made import BIG, SMALL, made_state, made_usage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"),
]

PAGES = ("/ui", "/ui/jobs", "/ui/usage", "/ui/requests?id=evil", "/ui/playground")


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    with browsing() as driver:
        yield driver


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[StandInIngress, str]]:
    ingress = StandInIngress()
    with listening(ingress) as url:
        yield ingress, url


@pytest.fixture
def cluster(site: tuple[StandInIngress, str], driver: webdriver.Chrome) -> StandInIngress:
    """As it was in the beginning."""
    resize(driver, "desktop")
    complaints(driver)
    vars(site[0]).update(vars(StandInIngress()))
    return site[0]


@pytest.fixture
def url(site: tuple[StandInIngress, str]) -> str:
    return site[1]


def find(driver: webdriver.Chrome, selector: str) -> WebElement:
    return driver.find_element(By.CSS_SELECTOR, selector)


def focused(driver: webdriver.Chrome) -> WebElement:
    return driver.switch_to.active_element


def press(driver: webdriver.Chrome, *keys: str) -> WebElement:
    """What has the focus after these keys."""
    for key in keys:
        focused(driver).send_keys(key)
    return focused(driver)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_every_screen(
    driver: webdriver.Chrome, cluster: StandInIngress, url: str, size: str, dark: bool
) -> None:
    cluster.timelines["evil"] = EVIL_TIMELINE
    resize(driver, size, dark=dark)
    for page in PAGES:
        driver.get(f"{url}{page}")
        for within in (":root", "nav"):
            wide, room = driver.execute_script(
                f"const one = document.querySelector('{within}'); return [one.scrollWidth, one.clientWidth]"
            )
            assert wide <= room, (page, within)
        paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(14, 17, 22)") is dark
        # Nothing that is read lies beside the window, or is as small as a footnote.
        assert not driver.execute_script(
            """return [...document.querySelectorAll('main *')].filter(each => {
                 const box = each.getBoundingClientRect(), style = getComputedStyle(each);
                 return !each.closest('.hidden, thead') && box.width
                   && (box.right > innerWidth + 1 || parseFloat(style.fontSize) < 11.5);
               }).map(each => each.outerHTML.slice(0, 80))"""
        ), page
    assert not complaints(driver)


CONTRAST = """
const luminance = colour => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = each => {
  for (let at = each; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  }
  return 'rgb(255, 255, 255)';
};
return [...document.querySelectorAll('body *')].filter(each =>
  [...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
  && each.getBoundingClientRect().width && !each.closest('[hidden], option, :disabled')
).map(each => {
  const [a, b] = [getComputedStyle(each).color, behind(each)].map(luminance).sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), each.outerHTML.slice(0, 90)];
}).filter(([ratio]) => ratio < 4.5);
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_can_be_read(driver: webdriver.Chrome, cluster: StandInIngress, url: str, dark: bool) -> None:
    resize(driver, "desktop", dark=dark)
    for page in PAGES:
        driver.get(f"{url}{page}")
        assert driver.execute_script(CONTRAST) == [], page


def test_by_keyboard_alone(driver: webdriver.Chrome, cluster: StandInIngress, url: str) -> None:
    driver.get(f"{url}/ui")
    skip = press(driver, Keys.TAB)
    assert skip.text == "Skip to the content"
    assert skip.rect["x"] >= 0
    names = []
    for _ in range(9):
        names.append(press(driver, Keys.TAB).text)
        outline = driver.execute_script("return getComputedStyle(document.activeElement).outlineWidth")
        assert outline == "3px", names
    assert names == [
        "Pools", "Jobs", "Usage", "Requests", "Playground", "Pause", "this state as JSON", "metrics", "API",
    ]  # fmt: skip
    driver.get(f"{url}/ui")
    press(driver, Keys.TAB, Keys.ENTER)
    assert focused(driver).get_attribute("id") == "main"
    # By Requests to an id, and back to the list.
    driver.get(f"{url}/ui/requests")
    find(driver, "#id").send_keys("gone", Keys.ENTER)
    until(lambda: "Nothing is known of a request" in driver.page_source)
    assert driver.current_url.endswith("/ui/requests?id=gone")


def spoken(driver: webdriver.Chrome) -> list[tuple[str, str]]:
    """Roles and names of all that there is for a screen reader."""
    tree = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]


def test_what_a_screen_reader_is_told(driver: webdriver.Chrome, cluster: StandInIngress, url: str) -> None:
    driver.get(f"{url}/ui")
    told = spoken(driver)
    assert ("table", f"Replicas of {BIG}") in told
    assert ("columnheader", "KV cache") in told
    assert ("meter", "KV cache in use") in told
    assert ("region", "The last hour") in told
    assert ("image", "Requests a minute, the last 60 minutes, at most 99 requests a minute") in told
    headings = {name for role, name in told if role == "heading"}
    assert {"Pools", BIG, SMALL, "Starting", "The last hour", "Last faults"} == headings
    assert not [role for role, name in told if role in ("link", "button", "image", "textbox") and not name]
    driver.get(f"{url}/ui/usage")
    told = spoken(driver)
    assert ("table", "What projects have had in the last hour, the dearest first") in told
    assert ("table", "How near limits are, the nearest first") in told
    assert {("columnheader", "Tokens out"), ("rowheader", "acme/search"), ("meter", "Of the limit")} <= set(told)
    assert ("cell", "97,400 of 100,000 tokens a minute") in told
    assert [name for role, name in told if role == "heading"] == ["Usage", "The last hour", "The last day", "Limits"]


def test_it_keeps_itself_fresh_and_can_be_stopped(driver: webdriver.Chrome, cluster: StandInIngress, url: str) -> None:
    driver.get(f"{url}/ui")
    assert find(driver, "#standing").text == "degraded"
    standing = find(driver, "#standing")
    cluster.state = replace(made_state(), state="ready", problems=())
    until(lambda: standing.text == "ready")
    # In place: who listens to it hears the new word.
    assert standing.get_attribute("class") == "badge ready"
    assert not driver.find_elements(By.CSS_SELECTOR, ".problems")
    find(driver, "#pause").click()
    assert find(driver, "#pause").get_attribute("aria-pressed") == "true"
    seen = len(cluster.asked)
    cluster.state = made_state()
    driver.execute_async_script("setTimeout(arguments[0], 2600)")
    assert (standing.text, len(cluster.asked)) == ("ready", seen)
    find(driver, "#pause").click()
    until(lambda: standing.text == "degraded")


def test_the_policy_holds(driver: webdriver.Chrome, cluster: StandInIngress, url: str) -> None:
    driver.get(f"{url}/ui")
    ran = driver.execute_async_script(
        """const done = arguments[0], broken = [];
           document.addEventListener('securitypolicyviolation', e => broken.push(e.effectiveDirective));
           const script = document.createElement('script');
           script.textContent = 'window.hacked = 1';
           const image = document.createElement('img');
           image.setAttribute('onerror', 'window.hacked = 2');
           image.src = 'data:image/png,x';
           const frame = document.createElement('iframe');
           frame.src = location.href;
           const style = document.createElement('p');
           style.setAttribute('style', 'color: red');
           document.body.append(script, image, frame, style);
           fetch('http://127.0.0.1:9/').catch(() => 0);
           setTimeout(() => done([window.hacked || 0, [...new Set(broken)].sort()]), 500);"""
    )
    assert ran[0] == 0
    assert {"connect-src", "frame-src", "img-src", "script-src-elem", "style-src-attr"} <= set(ran[1])


@pytest.mark.parametrize("page", PAGES)
def test_what_others_say_is_not_obeyed(driver: webdriver.Chrome, cluster: StandInIngress, url: str, page: str) -> None:
    cluster.timelines["evil"] = EVIL_TIMELINE
    cluster.slowest = [{"id": EVIL, "model": EVIL, "status": EVIL, "slowest_stage": EVIL}]
    cluster.state, cluster.usage = evil_state(made_state()), evil_usage(made_usage())
    driver.get(f"{url}{page}")
    nothing_ran(driver)
    # Nor when it comes by the script.
    cluster.state = replace(cluster.state, version=EVIL, at=cluster.state.at + 60)
    until(lambda: "12:01" in find(driver, "#at").text)
    nothing_ran(driver)
    if page.startswith("/ui/requests"):
        driver.find_element(By.CSS_SELECTOR, "#slowest a").click()
        assert find(driver, "#id").get_attribute("value") == EVIL
        nothing_ran(driver)


def nothing_ran(driver: webdriver.Chrome) -> None:
    # An alert would fail whatever is asked of the driver.
    assert driver.execute_script("return document.querySelectorAll('img, iframe, script:not([src])').length") == 0
    refused = [line for line in complaints(driver) if "404" not in line]
    assert not refused


def test_the_playground_streams(driver: webdriver.Chrome, cluster: StandInIngress, url: str) -> None:
    driver.get(f"{url}/ui/playground")
    models = [option.text for option in driver.find_elements(By.CSS_SELECTOR, "#model option")]
    assert models == [BIG, SMALL]
    find(driver, "#prompt").send_keys("What does the fox do?")
    find(driver, "#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    until(lambda: find(driver, "#said").text == "Answered.")
    assert [bubble.text for bubble in driver.find_elements(By.CSS_SELECTOR, ".bubble .words")] == [
        "What does the fox do?",
        "The quick brown fox.",
    ]
    assert "3 tokens" in find(driver, ".assistant .quiet").text
    assert (find(driver, ".assistant a").get_attribute("href") or "").endswith("/ui/requests?id=chat%2F1")
    assert focused(driver).get_attribute("id") == "prompt"
    find(driver, "#prompt").send_keys("And then?")
    find(driver, "#send").click()
    until(lambda: len(cluster.chats) == 2 and find(driver, "#send").is_enabled())
    assert [message["content"] for message in cluster.chats[1]["messages"]] == [
        "What does the fox do?",
        "The quick brown fox.",
        "And then?",
    ]
    find(driver, "#clear").click()
    assert not driver.find_elements(By.CSS_SELECTOR, ".bubble")


def test_what_a_model_says_is_text(driver: webdriver.Chrome, cluster: StandInIngress, url: str) -> None:
    cluster.says = [EVIL[:9], EVIL[9:]]
    driver.get(f"{url}/ui/playground")
    ask(driver, EVIL)
    until(lambda: find(driver, "#said").text == "Answered.")
    assert [bubble.text for bubble in driver.find_elements(By.CSS_SELECTOR, ".bubble .words")] == [EVIL, EVIL]
    nothing_ran(driver)
    # An error in the midst of a stream, and one in the place of it; what was asked is not lost.
    broken: list[str | dict[str, Any]] = ["Half", {"error": {"message": EVIL}}]
    for cluster.says, cluster.refuses in ((broken, ""), (list(broken), EVIL)):
        ask(driver, "again")
        until(lambda: find(driver, "#said").text == "It failed.")
        assert driver.find_elements(By.CSS_SELECTOR, ".bubble .bad")[-1].text == EVIL
        assert find(driver, "#prompt").get_attribute("value") == "again"
        driver.execute_script("document.getElementById('said').textContent = ''")
    assert driver.execute_script("return document.querySelectorAll('img, iframe').length") == 0
    # What failed is not said again with the next message.
    cluster.says, cluster.refuses = ["yes"], ""
    ask(driver, "once more")
    until(lambda: find(driver, "#said").text == "Answered.")
    assert [message["content"] for message in cluster.chats[-1]["messages"]] == [EVIL, EVIL, "once more"]


def ask(driver: webdriver.Chrome, text: str) -> None:
    find(driver, "#prompt").clear()
    find(driver, "#prompt").send_keys(text)
    find(driver, "#send").click()
