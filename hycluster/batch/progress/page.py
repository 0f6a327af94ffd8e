"""``report.html``: the figures of a job on one page that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined

from hycluster.batch.progress.terminal import duration

# Of a plot, in the units of its SVG.
WIDTH, HEIGHT = 720, 160

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ output }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.3em; overflow-wrap: anywhere }
h2 { font-size: 1.05em; margin: 2em 0 .3em }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .1em .8em .1em 0; vertical-align: top; font-weight: normal }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
th, .axis { color: #666; font-size: 13px }
svg { width: 100%; height: auto; border-bottom: 1px solid #999 }
rect { fill: #3a6ea5 }
.axis { display: flex; justify-content: space-between }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
</style>
{% macro plot(title, unit, bars, first, last) %}
{% if bars %}
<h2>{{ title }}</h2>
<div class="axis"><span>{{ unit }}, at most {{ number(bars | map(attribute="value") | max) }}</span></div>
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ title }}">
{% for bar in bars %}<rect x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}" height="{{ bar.height }}">
<title>{{ bar.label }}: {{ number(bar.value) }} {{ unit }}</title></rect>
{% endfor %}</svg>
<div class="axis"><span>{{ first }}</span><span>{{ last }}</span></div>
{% endif %}
{% endmacro %}
{% macro shares(title, counts) %}
{% if counts %}
<h2>{{ title }}</h2>
<table>{% for name, rows in counts.items() %}
<tr><td>{{ name }}</td><td class="n">{{ rows }}</td>
<td class="n">{{ "%.2f" | format(100 * rows / counts.values() | sum) }} %</td></tr>{% endfor %}
</table>
{% endif %}
{% endmacro %}
<h1>{{ output }}</h1>
<table>{% for label, value in summary %}
<tr><th>{{ label }}</th><td>{{ value }}</td></tr>{% endfor %}
</table>
{{ plot("Rows over time", "rows/s", rows_over_time, "0:00:00", end) }}
{{ plot("Tokens over time", "tokens/s", tokens_over_time, "0:00:00", end) }}
{{ plot("Length of outputs", "rows", lengths, "0 tokens", "%s tokens" | format(longest)) }}
{{ shares("Finish reasons", finish_reasons) }}
{{ shares("Quarantine reasons", quarantine_reasons) }}
{% if slowest %}
<h2>Slowest shards</h2>
<table><tr><th class="n">shard</th><th>first row</th><th class="n">rows</th><th class="n">tokens</th>
<th class="n">seconds</th></tr>{% for shard in slowest %}
<tr><td class="n">{{ shard.shard }}</td><td>{{ shard.input_file }}#{{ shard.first_row }}</td>
<td class="n">{{ shard.rows }}</td><td class="n">{{ shard.completion_tokens }}</td>
<td class="n">{{ "%.1f" | format(shard.seconds) }}</td></tr>{% endfor %}
</table>
{% endif %}
<h2>Job</h2>
<table>{% for name, value in job.items() %}{% if value is not none %}
<tr><th>{{ name }}</th><td><pre>{{ value }}</pre></td></tr>{% endif %}{% endfor %}
</table>
</html>
"""


def render(figures: dict[str, Any]) -> str:
    """The page, from what ``report.json`` holds."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    times, lengths = figures["throughput"], figures["completion_tokens"]["bins"]
    at = [duration(time["from_s"]) for time in times]
    return environment.from_string(_PAGE).render(
        output=figures["output"],
        job=figures["job"],
        summary=_summary(figures),
        rows_over_time=_bars([time["rows_per_s"] for time in times], at),
        tokens_over_time=_bars([time["tokens_per_s"] for time in times], at),
        end=duration((figures["committed_at"] or 0) - (figures["begun_at"] or 0)),
        lengths=_bars([some["rows"] for some in lengths], [f"from {some['from_tokens']} tokens" for some in lengths]),
        longest=figures["completion_tokens"]["max"],
        finish_reasons=figures["finish_reasons"],
        quarantine_reasons=figures["quarantine_reasons"],
        slowest=figures["slowest_shards"],
        width=WIDTH,
        height=HEIGHT,
        number=_number,
    )


def _summary(figures: dict[str, Any]) -> list[tuple[str, str]]:
    totals, lengths = figures["totals"], figures["completion_tokens"]
    lines = [
        ("rows", f"{totals['rows']} of {figures['input']['rows']}"),
        ("quarantined", str(totals["quarantined"])),
        ("shards", str(figures["shards"])),
        ("prompt tokens", str(totals["prompt_tokens"])),
        ("completion tokens", str(totals["completion_tokens"])),
    ]
    if figures["busy_s"]:
        lines += [
            ("began", _utc(figures["begun_at"])),
            ("last commit", _utc(figures["committed_at"])),
            ("in work", duration(figures["busy_s"])),
            ("rows/s", _number(figures["rows_per_s"])),
            ("tokens/s", _number(figures["tokens_per_s"])),
        ]
    if lengths["bins"]:
        lines.append(("tokens a row", f"p50 {lengths['p50']}, p90 {lengths['p90']}, p99 {lengths['p99']}"))
    return lines


def _bars(values: Sequence[float], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Rectangles of one plot, the highest as high as the plot."""
    highest = max(values, default=0) or 1
    step = WIDTH / max(1, len(values))
    return [
        {
            "x": round(number * step, 2),
            "y": round(HEIGHT - HEIGHT * value / highest, 2),
            "width": round(step * 0.9, 2),
            "height": round(HEIGHT * value / highest, 2),
            "value": value,
            "label": label,
        }
        for number, (value, label) in enumerate(zip(values, labels, strict=True))
    ]


def _number(value: float) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
