"""What a simulation says, for readers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def report_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """One after the other."""
    yield f"step times: {found['step_times']}"
    failed = f", {found['failed']} of them too long" if found["failed"] else ""
    yield (
        f"{found['requests']:,} requests{failed} at {found['scale']:.3g} times the trace, {found['scheduler']}"
        f" scheduler, {found['policy']}"
    )
    prompt, bounds = found["prompt_tokens"], found["bounds"]
    yield (
        f"{prompt:,} prompt tokens, {_share(found['prefix_hit_tokens'], prompt)} of them in the prefix cache (one LRU"
        f" of all caches: {_share(bounds['pooled_lru_hit_tokens'], prompt)}, without limit:"
        f" {_share(bounds['unlimited_hit_tokens'], prompt)})"
    )
    if (decision := found["decision_us"])["p50"] is not None:
        yield f"a choice of a replica took {decision['p50']:.0f} us (p99 {decision['p99']:.0f})"
    yield f"{'ms':<18}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}"
    for where, part in (("", found), (" alone", found.get("alone", {}))):
        for key, title in (("ttft_s", "TTFT"), ("tpot_s", "TPOT")):
            if key in part:
                yield f"{title + where:<18}" + "".join(_ms(part[key][each]) for each in ("mean", "p50", "p90", "p99"))
    if bulk := found.get("bulk"):
        yield (
            f"bulk: {bulk['rows']:,} rows, {_rate(bulk['tokens_per_s'])} output tokens/s,"
            f" {bulk['given_up']} rows given up"
        )
    if "online_load" in found:
        yield (
            f"online work is {found['online_load']:.0%} of the capacity; the job alone:"
            f" {_rate(found['bulk_alone_tokens_per_s'])} tokens/s, so {_rate(found['left_over_tokens_per_s'])} are"
            " left over"
        )
    yield (
        f"{found['duration_s']:.0f} s, {found['steps']:,} steps, engines busy {found['busy_share']:.0%} of the time,"
        f" {found['replica_hours']:.2f} replica hours, {found['gpu_hours']:.2f} GPU hours"
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _ms(value: float | None) -> str:
    return f"{value * 1e3:>10.1f}" if value is not None else f"{'-':>10}"


def _rate(value: float | None) -> str:
    return f"{value:,.1f}" if value is not None else "-"
