"""What came of a trace as one HTML page: no script, nothing from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hycluster.simulate.figures import at_share
from hycluster.simulate.outcome import Served, TraceOutcome
from hycluster.simulate.report import report_lines

WIDTH, HEIGHT, LEFT = 860, 180, 60
# Of the trace's time, each with its own values.
PARTS = 60
_STYLE = (
    "body{font:14px sans-serif;max-width:940px;margin:2em auto;color:#222}"
    "svg{display:block;overflow:visible}text{font-size:11px;fill:#666}pre{background:#f5f5f5;padding:1em}"
    "@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}pre{background:#242424}text{fill:#aaa}}"
)
_COLOURS = ("#3a6ea5", "#b5541c")


def html_page(outcome: TraceOutcome, found: Mapping[str, Any]) -> str:
    """The page: TTFT and hits over time, load by replica, and the figures."""
    served = [each for each in outcome.served if not each.failed]
    parts = _parts(served, outcome.window_s)
    minutes = outcome.window_s / 60
    p50, p99 = ([at_share([one.ttft_s for one in part], share) for part in parts] for share in (0.5, 0.99))
    hits = [_share(part) for part in parts]
    mean = sum(outcome.tokens) / max(1, len(outcome.tokens))
    loads = [tokens / mean if mean else 0.0 for tokens in outcome.tokens]
    across = f"0 to {minutes:.0f} minutes"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>hycluster simulate</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(str(found['policy']))}, {len(loads)} replicas</h1>"
        + _plot("TTFT over time, seconds: median (blue), p99 (brown)", across, [p50, p99])
        + _plot("Share of the prompts' tokens that were cached, over time", across, [hits])
        + _plot("Tokens given to each replica, over the mean", f"replicas 0 to {len(loads) - 1}", [], loads)
        + f"<pre>{html.escape(chr(10).join(report_lines(found)))}</pre></body></html>\n"
    )


def _parts(served: Sequence[Served], window_s: float) -> list[list[Served]]:
    parts: list[list[Served]] = [[] for _ in range(PARTS)]
    for one in served:
        parts[min(PARTS - 1, int(PARTS * one.request.at_s / window_s) if window_s else 0)].append(one)
    return parts


def _share(part: Sequence[Served]) -> float | None:
    prompts = sum(one.request.prompt_tokens for one in part)
    return sum(one.cached for one in part) / prompts if prompts else None


def _plot(title: str, across: str, lines: Sequence[Sequence[float | None]], bars: Sequence[float] = ()) -> str:
    values = [value for line in lines for value in line if value is not None and not math.isnan(value)]
    most = max([*values, *bars], default=0.0) or 1.0
    drawn = []
    for line, colour in zip(lines, _COLOURS, strict=False):
        step = WIDTH / max(1, len(line) - 1)
        # What no request came in has no value, and the line goes on to the next.
        points = [
            f"{LEFT + number * step:.1f},{HEIGHT * (1 - value / most):.1f}"
            for number, value in enumerate(line)
            if value is not None
        ]
        drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{" ".join(points)}"/>')
    width = WIDTH / max(1, len(bars))
    for number, value in enumerate(bars):
        high = HEIGHT * value / most
        drawn.append(
            f'<rect x="{LEFT + number * width:.1f}" y="{HEIGHT - high:.1f}" width="{max(0.5, 0.8 * width):.1f}"'
            f' height="{high:.1f}" fill="{_COLOURS[0]}"/>'
        )
    frame = (
        f'<path d="M{LEFT} 0V{HEIGHT}H{LEFT + WIDTH}" fill="none" stroke="#999"/>'
        f'<text x="{LEFT - 6}" y="10" text-anchor="end">{most:.3g}</text>'
        f'<text x="{LEFT - 6}" y="{HEIGHT}" text-anchor="end">0</text>'
        f'<text x="{LEFT}" y="{HEIGHT + 16}">{html.escape(across)}</text>'
    )
    size = f'width="{WIDTH + LEFT}" height="{HEIGHT + 30}"'
    return (
        f"<h2>{html.escape(title)}</h2>"
        f'<svg role="img" aria-label="{html.escape(title)}" {size}>{frame}{"".join(drawn)}</svg>'
    )
