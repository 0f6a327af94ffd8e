"""Debian's Chromium, driven by selenium, and what it looks at: a stand-in for an ingress, on a port of its own."""

from __future__ import annotations

import base64
import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from selenium import webdriver

from tests.page.stand_in import StandInIngress
from tests.waiting import PATIENCE_S

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
# A monitor, a tablet, a phone: width and height.
SIZES = {"desktop": (1280, 900), "tablet": (820, 1100), "phone": (390, 844)}


@contextlib.contextmanager
def browsing() -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own."""
    assert CHROMIUM is not None
    assert DRIVER is not None
    profile = tempfile.mkdtemp(prefix="chromium-")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)


def resize(driver: webdriver.Chrome, size: str, *, dark: bool = False) -> None:
    width, height = SIZES[size]
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def screenshot(driver: webdriver.Chrome, path: Path, *, most: int = 4000) -> None:
    """The whole page, down to ``most`` pixels."""
    width = int(driver.execute_script("return document.documentElement.clientWidth"))
    height = min(most, int(driver.execute_script("return document.documentElement.scrollHeight")))
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(shot["data"]))


def complaints(driver: webdriver.Chrome) -> list[str]:
    """What the console has said since it was asked last."""
    log: Any = driver
    return [entry["message"] for entry in log.get_log("browser")]


def until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """What comes true; fails after ``timeout_s``."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def listening(ingress: StandInIngress) -> Iterator[str]:
    """Where it is."""
    server = uvicorn.Server(uvicorn.Config(ingress.app, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
