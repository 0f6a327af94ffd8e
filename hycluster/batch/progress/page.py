"""``_report.html``: the figures of a job on one page that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import glob
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hycluster.batch.progress.terminal import duration, per_second
from hycluster.settings.as_yaml import as_yaml

# Of a plot, in the units of its SVG.
WIDTH, HEIGHT = 720, 160
# More outputs than that which were cut off are told on top.
CUT_OFF_SHARE = 0.1


def render_page(figures: dict[str, Any]) -> str:
    """The page, from what ``_report.json`` holds."""
    environment = Environment(
        loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    times, lengths = figures["throughput"], figures["completion_tokens"]["bins"]
    at = [duration(time["from_s"]) for time in times]
    verdict = _verdict(figures)
    return environment.get_template("report.html.jinja").render(
        output=figures["output"],
        verdict=verdict,
        readers=reader_lines(figures["output"]) if verdict[0] != "bad" else {},
        warnings=list(figure_warnings(figures)),
        job=as_yaml({key: value for key, value in figures["job"].items() if value is not None}),
        summary=_summary(figures),
        samples=figures["samples"],
        quarantine_samples=figures["quarantine_samples"],
        rows_over_time=_bars([time["rows_per_s"] for time in times], at),
        tokens_over_time=_bars([time["tokens_per_s"] for time in times], at),
        times=[duration(part / 4 * ((figures["committed_at"] or 0) - (figures["begun_at"] or 0))) for part in range(5)],
        lengths=_bars([some["rows"] for some in lengths], [f"from {some['from_tokens']} tokens" for some in lengths]),
        lengths_at=[f"{round(part / 4 * (figures['completion_tokens']['max'] or 0))} tokens" for part in range(5)],
        finish_reasons=figures["finish_reasons"],
        quarantine_reasons=figures["quarantine_reasons"],
        slowest=figures["slowest_shards"],
        width=WIDTH,
        height=HEIGHT,
        number=_number,
    )


def reader_lines(output: str) -> dict[str, str]:
    """How the rows of a finished output are read, by whom.

    By some as a folder: what begins with ``_`` is no row to them. The others take all Parquet below a folder, that of
    the quarantine, too, or no folder that holds anything else.
    """

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    # Brackets in a folder's name are none of the pattern's.
    pattern = f"{glob.escape(output)}/*.parquet"
    folder, parts = quoted(output), quoted(pattern)
    in_sql = pattern.replace("'", "''")
    return {
        "pandas": f"pandas.read_parquet({folder})",
        "pyarrow": f"pyarrow.dataset.dataset({folder})",
        "Spark": f"spark.read.parquet({folder})",
        "polars": f"polars.read_parquet({parts})",
        "DuckDB": f"""duckdb.sql({quoted(f"FROM '{in_sql}'")})""",
        "datasets": f'datasets.load_dataset("parquet", data_files={parts})',
    }


def _verdict(figures: dict[str, Any]) -> tuple[str, str]:
    """What came of the job, in one line, and how bad that is: ``good``, ``fair`` or ``bad``."""
    totals, rows = figures["totals"], figures["input"]["rows"]
    if figures["ended"]:
        return "bad", f"ended without a result: {figures['ended']}"
    if totals["rows"] < rows:
        return "bad", f"not finished: {totals['rows']} of {rows} rows are committed"
    lost = totals["quarantined"]
    if lost:
        return "fair", f"done: {rows - lost} of {rows} rows, {lost} are in the quarantine"
    return "good", f"done: all {rows} rows"


def figure_warnings(figures: dict[str, Any]) -> Iterator[str]:
    """What the one whose job it is should know before the rows are used."""
    reasons = figures["finish_reasons"]
    cut, rows = reasons.get("length", 0), sum(reasons.values())
    if rows and cut / rows >= CUT_OFF_SHARE:
        yield (
            f"{100 * cut / rows:.0f} % of the outputs were cut off (finish reason 'length'): sampling.max_tokens, or"
            " what the model's context left, was too little for them"
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
            ("rows/s", per_second(figures["rows_per_s"])),
            ("tokens/s", per_second(figures["tokens_per_s"])),
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
    return per_second(value) if isinstance(value, float) else str(value)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
