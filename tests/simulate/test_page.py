from __future__ import annotations

from html.parser import HTMLParser

from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from hycluster.simulate.fast import serve_fast
from hycluster.simulate.machine import simulated_machine
from hycluster.simulate.page import html_page
from hycluster.simulate.traces import TraceRequest


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        assert not {"src", "href"} & dict(attrs).keys(), "nothing from elsewhere"


def test_a_page_with_three_plots() -> None:
    trace = [TraceRequest(at / 4, 1200, 20, (at % 3, 100 + at, 200 + at)) for at in range(60)]
    machine = simulated_machine(Model(name="m", source="nowhere"), Simulated(), "test")
    outcome, found = serve_fast(machine, trace, replicas=3, policy="predicted_ttft", seed=0)
    found |= {"scale": 1.0, "scheduler": "counted", "policy": "<best>"}
    page = html_page(outcome, found)
    tags = Tags()
    tags.feed(page)
    assert [tags.found.count(tag) for tag in ("svg", "polyline", "rect")] == [3, 3, 3]
    assert "<best>" not in page
    assert "script" not in tags.found
    assert "nan" not in page
