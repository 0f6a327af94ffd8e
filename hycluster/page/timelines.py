"""Where a request's time went, as the ingress's own routes tell it: asked within the process, and made fit to be shown.

``GET /hycluster/requests/{id}`` and ``GET /hycluster/requests?slowest=N``. An ingress that has no such routes, or does
not know the request, answers 404; then there is nothing to show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote

import httpx
from starlette.types import ASGIApp

from hycluster.ingress.timelines import PATH

# More of a request are not read by people.
MOST_SPANS, MOST_EVENTS = 200, 200
WIDTH = 600


@dataclass(frozen=True, slots=True)
class ShownSpan:
    """One span. ``x`` and ``width`` are its place in a bar of :data:`WIDTH`."""

    name: str
    process: str
    start_s: float
    duration_s: float
    x: float
    width: float
    attributes: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ShownEvent:
    name: str
    at_s: float | None
    attributes: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ShownTimeline:
    """One request."""

    id: str
    model: str
    status: str
    started: float | None
    duration_s: float | None
    spans: tuple[ShownSpan, ...]
    events: tuple[ShownEvent, ...]


@dataclass(frozen=True, slots=True)
class SlowRequest:
    id: str
    model: str
    status: str
    started: float | None
    duration_s: float | None
    ttft_s: float | None
    slowest_stage: str


async def ask_timeline(app: ASGIApp, request_id: str, key: str | None) -> ShownTimeline | None:
    """The request of that id; None if nothing is known of it."""
    told = await _get(app, f"{PATH}/{quote(request_id, safe='')}", key)
    return as_shown(told) if isinstance(told, dict) and "spans" in told else None


async def ask_slowest(app: ASGIApp, most: int, key: str | None) -> list[SlowRequest] | None:
    """The slowest requests, the slowest first; None where no such list is kept."""
    told = await _get(app, f"{PATH}?slowest={most}", key)
    if not isinstance(told, dict) or not isinstance(told.get("requests"), list):
        return None
    return [
        SlowRequest(
            _text(each.get("id")),
            _text(each.get("model")),
            _text(each.get("status")),
            _moment(each.get("started")),
            _number(each.get("duration_s")),
            _number(each.get("ttft_s")),
            _text(each.get("slowest_stage")),
        )
        for each in told["requests"][:most]
        if isinstance(each, dict)
    ]


def as_shown(told: dict[str, Any]) -> ShownTimeline:
    """What the route says, made fit to be shown."""
    spans = [each for each in told.get("spans") or () if isinstance(each, dict)][:MOST_SPANS]
    ends = [(_number(each.get("start_s")) or 0.0) + (_number(each.get("duration_s")) or 0.0) for each in spans]
    whole = max([_number(told.get("duration_s")) or 0.0, *ends]) or 1.0
    return ShownTimeline(
        _text(told.get("id")),
        _text(told.get("model")),
        _text(told.get("status")),
        _moment(told.get("started")),
        _number(told.get("duration_s")),
        tuple(_span(each, whole) for each in spans),
        tuple(_event(each) for each in (told.get("events") or ())[:MOST_EVENTS]),
    )


def _span(told: dict[str, Any], whole: float) -> ShownSpan:
    start, duration = _number(told.get("start_s")) or 0.0, _number(told.get("duration_s")) or 0.0
    x = min(WIDTH - 1.0, max(0.0, WIDTH * start / whole))
    return ShownSpan(
        _text(told.get("name")),
        _text(told.get("process")),
        start,
        duration,
        round(x, 1),
        # What took no time is seen all the same.
        round(min(WIDTH - x, max(1.5, WIDTH * duration / whole)), 1),
        _pairs(told.get("attributes")),
    )


def _event(told: Any) -> ShownEvent:
    if not isinstance(told, dict):
        return ShownEvent(_text(told), None, ())
    at = next((told[key] for key in ("at_s", "time_s", "start_s") if key in told), None)
    rest = {key: value for key, value in told.items() if key not in ("name", "at_s", "time_s", "start_s", "attributes")}
    return ShownEvent(_text(told.get("name")), _number(at), (*_pairs(rest), *_pairs(told.get("attributes"))))


def _pairs(told: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(told, dict):
        return ()
    return tuple((str(name), _text(value)) for name, value in told.items() if value is not None)


def _text(value: Any, limit: int = 300) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{name}: {each}" for name, each in value.items())
    text = "" if value is None else str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _moment(value: Any) -> float | None:
    """Seconds since the epoch, of a time as ISO 8601 has it."""
    try:
        return datetime.fromisoformat(value).timestamp() if isinstance(value, str) else _number(value)
    except ValueError:
        return None


async def _get(app: ASGIApp, path: str, key: str | None) -> Any:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://ingress", trust_env=False) as client:
        # Whoever may not ask there learns nothing here.
        answer = await client.get(path, headers={"Authorization": key} if key else {})
    if answer.status_code != httpx.codes.OK:
        return None
    try:
        return answer.json()
    except ValueError:
        return None
