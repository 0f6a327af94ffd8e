from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from bench.curve_plot import Curve, svg


@pytest.fixture(scope="module")
def drawn() -> str:
    return svg(
        Curve("callers", [(0, 0), (1, 3), (2, 3), (3, 0)]),
        Curve("replicas", [(0, 0), (2, 1)], wanted=[(0, 0), (1, 1)]),
        [(1.0, 12.5), (1.5, 0.01), (2.0, 0.02)],
    )


def test_it_says_what_is_seen(drawn: str) -> None:
    texts = {"".join(text.itertext()).strip() for text in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")}
    assert {"callers", "replicas", "time to first token, by when it was asked for", "seconds"} <= texts
    assert "filled: take requests; dashed: wanted" in texts
    assert {"0.01 s", "10 s"} <= texts


def test_each_request_is_a_dot(drawn: str) -> None:
    group = ET.fromstring(drawn).find(".//*[@id='ttft']")
    assert group is not None
    dots = [use.attrib for use in group.iter("{http://www.w3.org/2000/svg}use")]
    assert len(dots) == 3
    # The longest is the highest.
    assert min(dots, key=lambda dot: float(dot["y"])) is dots[0]


def test_commands_draw_nothing_and_do_not_load_matplotlib() -> None:
    looks = "import sys, hycluster.cli, hycluster.chaos.cli, hycluster.batch.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", looks], check=False).returncode == 0
