"""Plots of an hour as SVG shapes, in the units of a view box. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 600, 100
GAP = 2


@dataclass(frozen=True, slots=True)
class Bar:
    """One minute: what went well, and on top of it what did not."""

    x: float
    width: float
    good_y: float
    good_height: float
    bad_y: float
    bad_height: float


@dataclass(frozen=True, slots=True)
class Plot:
    """What a template draws. ``most`` is the value at the top; 0 if there is nothing to draw."""

    most: float
    bars: tuple[Bar, ...] = ()
    # Points of polylines; a minute without a value breaks the line.
    lines: tuple[str, ...] = ()
    begins_at: float | None = None


def bars(values: Sequence[tuple[float, float]], at: Sequence[float]) -> Plot:
    """A bar for each pair of what went well and what did not."""
    most = max((good + bad for good, bad in values), default=0)
    if not most:
        return Plot(0)
    step, found = WIDTH / len(values), []
    for number, (good, bad) in enumerate(values):
        good_height, bad_height = HEIGHT * good / most, HEIGHT * bad / most
        found.append(
            Bar(
                round(number * step + GAP / 2, 1),
                round(step - GAP, 1),
                round(HEIGHT - good_height, 1),
                round(good_height, 1),
                round(HEIGHT - good_height - bad_height, 1),
                round(bad_height, 1),
            )
        )
    return Plot(most, bars=tuple(found), begins_at=at[0] if at else None)


def line(values: Sequence[float | None]) -> Plot:
    """A line through the values, broken where there is none; a value by itself is a short dash."""
    most = max((value for value in values if value is not None), default=0.0)
    if not most:
        return Plot(0)
    step, lines, points = WIDTH / len(values), [], list[str]()
    for number, value in enumerate([*values, None]):
        if value is not None:
            y = round(HEIGHT - HEIGHT * value / most, 1)
            if not points:
                points.append(f"{round(number * step + GAP / 2, 1)},{y}")
            points.append(f"{round((number + 1) * step - GAP / 2, 1)},{y}")
        elif points:
            lines.append(" ".join(points))
            points = []
    return Plot(most, lines=tuple(lines))
