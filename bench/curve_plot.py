"""Load, replicas and TTFT over one axis of time, drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Points = Sequence[tuple[float, float]]

# Inches, of which the plots make three rows.
SIZE, HEIGHTS = (9.5, 6.4), (3, 3, 4)
TITLE = "Callers, replicas and time to first token over time"
LOAD, READY, WANTED = "#3a6ea5", "#3d7a36", "#b5541c"
# Text stays text, and the same figures make the same file.
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "load-curve", "font.family": "sans-serif", "axes.grid.axis": "y"}


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
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        # No pyplot: it would keep the figure, and ask for a screen.
        figure = Figure(SIZE, layout="constrained")
        callers, pool, first = figure.subplots(3, sharex=True, height_ratios=HEIGHTS)
        _panel(callers, load, end_s, LOAD)
        _panel(pool, replicas, end_s, READY)
        pool.set_title("filled: take requests; dashed: wanted", loc="right", fontsize="small")
        first.plot(*_columns(ttfts_s), "o", markersize=3, markeredgewidth=0, color=LOAD, alpha=0.55, gid="ttft")
        first.set_title("time to first token, by when it was asked for", loc="left", fontsize="medium")
        # A cold start is a thousand times as long as a warm one.
        first.set_yscale("log")
        first.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g} s"))
        first.set_xlim(0, end_s)
        first.set_xlabel("seconds")
        for axes in (callers, pool, first):
            axes.grid(visible=True, axis="y", color="#e4e4e4")
            axes.set_axisbelow(True)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Title": TITLE})
    return drawn.getvalue()


def _panel(axes: Axes, curve: Curve, end_s: float, colour: str) -> None:
    at_s, values = _until(curve.points, end_s)
    axes.fill_between(at_s, values, step="post", color=colour, alpha=0.25, linewidth=0)
    axes.step(at_s, values, where="post", color=colour, linewidth=1.5)
    if curve.wanted:
        axes.step(*_until(curve.wanted, end_s), where="post", color=WANTED, linewidth=1.5, linestyle="--")
    axes.set_title(curve.title, loc="left", fontsize="medium")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _until(points: Points, end_s: float) -> tuple[list[float], list[float]]:
    """Where the value changes; the last one holds until the end."""
    changes = [next(same) for _, same in groupby(points, key=itemgetter(1))]
    return _columns([*changes, (end_s, points[-1][1])])


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [at for at, _ in points], [value for _, value in points]
