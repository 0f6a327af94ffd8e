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
        "done: 13 of 14 rows, 1 are in the quarantine",
        "The first rows",
        "DEEP 0",
        "The first quarantined rows",
        "text: is null",
        "Settings",
        "task: generate",
        "14 of 14",
        "c.parquet#0",
    ):
        assert what in page.text, what


def test_a_job_that_failed_does_not_look_like_one_that_is_done(make_job: MakeJob, corpus: Path) -> None:
    found = figures(make_job, corpus)
    page = render_page({**found, "ended": "max_quarantined_fraction: 1 of 14 rows"})
    assert '<p class="verdict bad">ended without a result: max_quarantined_fraction: 1 of 14 rows</p>' in page
    page = render_page({**found, "totals": {**found["totals"], "rows": 9}})
    assert '<p class="verdict bad">not finished: 9 of 14 rows are committed</p>' in page
    page = render_page({**found, "totals": {**found["totals"], "quarantined": 0}})
    assert '<p class="verdict good">done: all 14 rows</p>' in page


def test_outputs_that_were_cut_off_are_told_on_top(make_job: MakeJob, corpus: Path) -> None:
    found = figures(make_job, corpus)
    assert "were cut off" not in render_page(found)
    page = render_page({**found, "finish_reasons": {"length": 13, "stop": 1}})
    assert "93 % of the outputs were cut off (finish reason &#39;length&#39;): sampling.max_tokens" in page


def test_plots_have_axes_with_ticks(make_job: MakeJob, corpus: Path) -> None:
    page = Tags(render_page(figures(make_job, corpus))).text
    assert "0 tokens1 tokens2 tokens2 tokens3 tokens" in page.replace("\n", "")


def test_settings_are_yaml(make_job: MakeJob, corpus: Path) -> None:
    page = render_page(figures(make_job, corpus, prompt="Say\n{text}"))
    assert "prompt: |-\n  Say\n  {text}\n" in page


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
