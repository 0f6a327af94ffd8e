"""Draws the pictures of docs/ui.md: a made cluster in a real browser.

.venv/bin/python -m tests.page.screenshots docs
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from selenium.webdriver.common.by import By

from tests.page.browsing import browsing, listening, resize, screenshot, until
from tests.page.stand_in import StandInIngress

ANSWER = "A mixture-of-experts layer holds many small networks, and a router sends each token to a few of them. "


def draw(folder: Path) -> None:
    ingress = StandInIngress()
    ingress.pause_s = 0.03
    ingress.says = [f"{word} " for word in (ANSWER + "So the model knows much and computes little.").split()]
    with listening(ingress) as url, browsing() as driver:
        resize(driver, "desktop")
        driver.get(f"{url}/ui")
        screenshot(driver, folder / "ui-pools.png")
        driver.get(f"{url}/ui/usage")
        screenshot(driver, folder / "ui-usage.png")
        resize(driver, "phone", dark=True)
        driver.get(f"{url}/ui")
        screenshot(driver, folder / "ui-phone.png", most=1250)
        resize(driver, "tablet")
        driver.get(f"{url}/ui/playground")
        driver.find_element(By.ID, "prompt").send_keys("What is a mixture of experts?")
        driver.find_element(By.ID, "send").click()
        until(lambda: driver.find_element(By.ID, "said").text == "Answered.")
        screenshot(driver, folder / "ui-playground.png", most=700)
    for drawn in folder.glob("ui-*.png"):
        # Few colours, a third of the bytes.
        Image.open(drawn).convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE).save(drawn, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
