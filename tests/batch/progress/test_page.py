from __future__ import annotations

import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hycluster.batch.progress.figures import write_report
from hycluster.batch.progress.page import HEIGHT, render_page
from tests.batch.committed import commit_all
from tests.batch.conftest import MakeJob, write_texts
from tests.located import at


class Tags(HTMLParser):
    """Every tag with its attributes, and the text between."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def figures(make_job: MakeJob, corpus: Path, **changes: Any) -> dict[str, Any]:
    write_texts(corpus / "c.parquet", ["one two three", None])
    return write_report(at(commit_all(make_job(**changes))))


def test_the_page_is_complete_in_itself(make_job: MakeJob, corpus: Path) -> None:
    page = Tags(render_page(figures(make_job, corpus)))
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe"}
    assert not [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    for what in (
        "Rows over time",
        "Tokens over time",
        "Length of outputs",
        "Finish reasons",
        "Quarantine reasons",
        "Slowest shards",
        "14 of 14",
        "c.parquet#0",
    ):
        assert what in page.text, what


def test_plots_are_drawn_within_their_frame(make_job: MakeJob, corpus: Path) -> None:
    page = render_page(figures(make_job, corpus))
    plots = [ET.fromstring(f"<svg{rest.partition('</svg>')[0]}</svg>") for rest in page.split("<svg")[1:]]
    assert [len(plot) for plot in plots] == [120, 120, 4]
    for plot in plots:
        heights = [float(bar.attrib["height"]) for bar in plot]
        assert max(heights) == HEIGHT
        assert all(float(bar.attrib["y"]) + height - HEIGHT < 0.02 for bar, height in zip(plot, heights, strict=True))


def test_what_a_job_says_can_not_become_markup(make_job: MakeJob, corpus: Path) -> None:
    page = render_page(figures(make_job, corpus, prompt="<script>alert(1)</script> {text}"))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
