"""Load, replicas and TTFT over one axis of time, as an SVG that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Points = Sequence[tuple[float, float]]

WIDTH, LEFT, RIGHT, TOP = 760, 60, 20, 14
PANEL, GAP, SCATTER = 110, 40, 150
PLOT = WIDTH - LEFT - RIGHT
MOST_TICKS = 10
_STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #333 } .title { font-weight: 600 }
.frame { fill: none; stroke: #bbb } .grid { stroke: #e4e4e4 }
.load { fill: #c9d8e8; stroke: #3a6ea5 } .ready { fill: #cfe3cd; stroke: #3d7a36; stroke-width: 1.5 }
.wanted { fill: none; stroke: #b5541c; stroke-width: 1.5; stroke-dasharray: 5 3 } .ttft { fill: #3a6ea5; opacity: .55 }
</style>"""


@dataclass(frozen=True)
class Curve:
    """What has a value from each point on until the next one.

    Attributes:
        wanted: the same for what there is to be, drawn over it.
    """

    title: str
    points: Points
    wanted: Points = field(default=())


def svg(load: Curve, replicas: Curve, ttfts_s: Points) -> str:
    """Three plots, one below the other.

    Args:
        ttfts_s: for each request when it was sent and the time to its first token, in seconds.
    """
    end_s = max(at for at, _ in (*load.points, *ttfts_s))
    scatter_top = TOP + 2 * (PANEL + GAP)
    height = scatter_top + SCATTER + 44
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
            ' aria-label="Callers, replicas and time to first token over time">'
        ),
        _STYLE,
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        *_panel(load, TOP, end_s, "load"),
        *_panel(replicas, TOP + PANEL + GAP, end_s, "ready"),
        (
            f'<text x="{LEFT + PLOT}" y="{TOP + PANEL + GAP - 4}" text-anchor="end">'
            "filled: take requests; dashed: wanted</text>"
        ),
        *_scatter(ttfts_s, scatter_top, end_s),
        *_time_axis(scatter_top + SCATTER, end_s),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _x(at_s: float, end_s: float) -> float:
    return LEFT + PLOT * at_s / end_s


def _panel(curve: Curve, top: float, end_s: float, style: str) -> list[str]:
    most = max(value for _, value in (*curve.points, *curve.wanted)) or 1
    base = top + PANEL

    def y(value: float) -> float:
        # Some air above the highest.
        return base - 0.92 * PANEL * value / most

    parts = [f'<text class="title" x="{LEFT}" y="{top - 4}">{curve.title}</text>', _frame(top, PANEL)]
    for tick in range(0, math.ceil(most) + 1, max(1, round(most / 5))):
        parts += _tick(y(tick), f"{tick}")
    area = f"M{LEFT:.1f},{base:.1f} {_steps(curve.points, end_s, y)} V{base:.1f} Z"
    parts.append(f'<path class="{style}" d="{area}"/>')
    if curve.wanted:
        start = f"M{LEFT:.1f},{y(curve.wanted[0][1]):.1f}"
        parts.append(f'<path class="wanted" d="{start} {_steps(curve.wanted, end_s, y)}"/>')
    return parts


def _steps(points: Points, end_s: float, y: Callable[[float], float]) -> str:
    steps = [f"H{_x(at, end_s):.1f} V{y(value):.1f}" for at, value in points]
    return " ".join([*steps, f"H{LEFT + PLOT:.1f}"])


def _scatter(ttfts_s: Points, top: float, end_s: float) -> list[str]:
    """On a logarithmic axis: a cold start is a thousand times as long as a warm one."""
    lowest = math.floor(math.log10(min(seconds for _, seconds in ttfts_s)))
    highest = math.ceil(math.log10(max(seconds for _, seconds in ttfts_s)))
    highest = max(highest, lowest + 1)

    def y(seconds: float) -> float:
        return top + SCATTER * (highest - math.log10(seconds)) / (highest - lowest)

    parts = [
        f'<text class="title" x="{LEFT}" y="{top - 4}">time to first token, by when it was asked for</text>',
        _frame(top, SCATTER),
    ]
    for power in range(lowest, highest + 1):
        parts += _tick(y(10.0**power), f"{10.0**power:g} s")
    return parts + [
        f'<circle class="ttft" cx="{_x(at, end_s):.1f}" cy="{y(seconds):.1f}" r="2"/>' for at, seconds in ttfts_s
    ]


def _frame(top: float, height: float) -> str:
    return f'<rect class="frame" x="{LEFT}" y="{top}" width="{PLOT}" height="{height}"/>'


def _tick(y: float, label: str) -> list[str]:
    return [
        f'<line class="grid" x1="{LEFT}" x2="{LEFT + PLOT}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>',
    ]


def _time_axis(base: float, end_s: float) -> list[str]:
    step = next(step for step in (5, 10, 20, 30, 60, 120, 300, 600, 3600) if end_s / step <= MOST_TICKS)
    marks = [
        f'<text x="{_x(at, end_s):.1f}" y="{base + 16}" text-anchor="middle">{at}</text>'
        for at in range(0, int(end_s) + 1, step)
    ]
    return [*marks, f'<text x="{LEFT + PLOT / 2}" y="{base + 34}" text-anchor="middle">seconds</text>']
