"""What a run showed: figures, the table, and whether it was well."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from hycluster.chaos.compare import difference, ill_formed
from hycluster.chaos.faults import InjectedFault
from hycluster.chaos.gateways import MigrationTotals
from hycluster.chaos.load import Outcome

MOST_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Spread:
    """Of some durations in seconds, or counts; None of none."""

    p50: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """By nearest rank."""
        ranked = sorted(values)
        if not ranked:
            return cls(None, None, None)
        at = [round(ranked[max(0, math.ceil(share * len(ranked)) - 1)], 3) for share in (0.5, 0.99, 1)]
        return cls(*at)


@dataclass(frozen=True, slots=True)
class Report:
    """See docs/chaos.md for what each figure means. Durations are in seconds.

    Attributes:
        requests: asked under faults, the same one counted as often as it was asked.
        failures, wrong: a line each.
        restarted: requests whose connection was lost and that were asked again.
        refused: requests that heard 429 or 503 before their first token, and were asked again.
        reference_failures: of the undisturbed run; then nothing can be said of those requests.
        faults: processes hit, by kind and place.
        whole_after_s: by kind and place, from the fault until all was whole again.
        not_whole: faults after which it did not become whole again.
        not_injected: faults that found nobody to hit.
        pause_s: of migrated requests, by their gateways.
    """

    model: str
    seed: int
    seconds: float
    requests: int
    exact_requests: int
    failures: list[str]
    wrong: list[str]
    reference_failures: list[str]
    restarted: int
    refused: int
    gap_undisturbed_s: Spread
    gap_s: Spread
    gap_at_fault_s: Spread
    streams_at_fault: int
    faults: dict[str, int]
    not_injected: int
    not_whole: int
    whole_after_s: dict[str, Spread]
    migrated: MigrationTotals | None
    pause_s: Spread | None
    prompt_tokens: int
    completion_tokens: int

    @property
    def well(self) -> bool:
        """Nothing failed, nothing was wrong, and all became whole again."""
        return not (self.failures or self.wrong or self.reference_failures or self.not_whole)

    def as_json(self) -> dict[str, Any]:
        """All figures, under the names here."""
        return {**asdict(self), "well": self.well}


def compare_outcomes(
    model: str, seed: int, reference: Sequence[Outcome], outcomes: Sequence[Outcome],
    injections: Sequence[InjectedFault], migrated: MigrationTotals | None, seconds: float,
) -> Report:  # fmt: skip
    """Compare and add up.

    Args:
        reference: one outcome a request, undisturbed.
        outcomes: under faults; a request may be there several times.
    """
    expected = {outcome.request.number: outcome for outcome in reference}
    wrong = []
    for outcome in outcomes:
        undisturbed = expected[outcome.request.number].answer
        if outcome.answer is None or undisturbed is None:
            continue
        if what := difference(outcome.request, undisturbed, outcome.answer):
            wrong.append(f"{outcome.request}: {what}")
    effective = [injected for injected in injections if injected.hit]
    return Report(
        model=model,
        seed=seed,
        seconds=round(seconds, 1),
        requests=len(outcomes),
        exact_requests=sum(outcome.request.exact for outcome in outcomes),
        failures=[f"{outcome.request}: {outcome.error}" for outcome in outcomes if outcome.error is not None],
        wrong=wrong,
        reference_failures=_reference_failures(reference),
        restarted=sum(outcome.restarts > 0 for outcome in outcomes),
        refused=sum(outcome.refusals > 0 for outcome in outcomes),
        gap_undisturbed_s=Spread.of([outcome.trace.longest_gap_s() for outcome in reference]),
        gap_s=Spread.of([outcome.trace.longest_gap_s() for outcome in outcomes]),
        gap_at_fault_s=Spread.of(at_fault := gaps_at_faults(outcomes, [injected.at_s for injected in effective])),
        streams_at_fault=len(at_fault),
        faults=dict(Counter(_name(injected) for injected in effective for _ in injected.hit)),
        not_injected=len(injections) - len(effective),
        not_whole=sum(injected.before is not None and injected.whole_after_s is None for injected in effective),
        whole_after_s={
            name: Spread.of([s.whole_after_s for s in effective if s.whole_after_s is not None and _name(s) == name])
            for name in sorted({_name(s) for s in effective if s.whole_after_s is not None})
        },
        migrated=migrated,
        pause_s=Spread(migrated.pause_s(0.5), migrated.pause_s(0.99), migrated.pause_s(1)) if migrated else None,
        prompt_tokens=sum(o.answer.prompt_tokens for o in outcomes if o.answer),
        completion_tokens=sum(o.answer.completion_tokens for o in outcomes if o.answer),
    )


def _name(injected: InjectedFault) -> str:
    return f"{injected.fault.kind} {injected.fault.where}"


def _reference_failures(reference: Sequence[Outcome]) -> list[str]:
    found = []
    for outcome in reference:
        what = outcome.error or (outcome.answer and ill_formed(outcome.request, outcome.answer))
        if what:
            found.append(f"{outcome.request}, undisturbed: {what}")
    return found


def gaps_at_faults(outcomes: Sequence[Outcome], faults_s: Sequence[float]) -> list[float]:
    """Of each stream that was open at a fault, its longest gap from then on; one for each fault."""
    return [
        outcome.trace.longest_gap_s(after_s=at_s)
        for at_s in faults_s
        for outcome in outcomes
        if outcome.trace.begun_s <= at_s < outcome.trace.ended_s
    ]


def show_report(found: Report, console: Console) -> None:
    """The table, and below it what failed or was wrong."""
    table = Table(title=f"chaos on {found.model}, seed {found.seed}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for label, value in _rows(found):
        table.add_row(label, value)
    console.print(table)
    for title, lines in (
        ("failed", found.failures),
        ("wrong", found.wrong),
        ("failed undisturbed", found.reference_failures),
    ):
        for line in lines[:MOST_SHOWN]:
            console.print(f"{title}: {line}", markup=False, highlight=False, soft_wrap=True)
        if len(lines) > MOST_SHOWN:
            console.print(f"{title}: {len(lines) - MOST_SHOWN} more", highlight=False)


def _rows(found: Report) -> list[tuple[str, str]]:
    rows = [
        ("requests", str(found.requests)),
        ("  greedy or seeded", str(found.exact_requests)),
        ("failures", str(len(found.failures))),
        ("wrong answers", str(len(found.wrong))),
        ("failures, undisturbed", str(len(found.reference_failures))),
        ("asked again: connection lost", str(found.restarted)),
        ("asked again: refused before a token", str(found.refused)),
        (f"longest gaps in s {_SPREAD}", ""),
        ("  undisturbed", _spread(found.gap_undisturbed_s)),
        ("  under faults", _spread(found.gap_s)),
        (f"  of {found.streams_at_fault} streams open at a fault", _spread(found.gap_at_fault_s)),
    ]
    if found.migrated is not None and found.pause_s is not None:
        tokens = found.prompt_tokens + found.completion_tokens
        share = found.migrated.tokens_recomputed / tokens if tokens else 0
        rows += [
            (f"  of {found.migrated.requests} migrated requests", _spread(found.pause_s)),
            ("tokens", str(tokens)),
            ("  computed twice", f"{found.migrated.tokens_recomputed} ({share:.2%})"),
        ]
    else:
        rows.append(("tokens computed twice", "these ingress processes do not count them"))
    rows += [(f"faults: {name}", str(count)) for name, count in sorted(found.faults.items())]
    if found.not_injected:
        rows.append(("faults that found nobody to hit", str(found.not_injected)))
    if found.whole_after_s:
        rows.append((f"whole again after s {_SPREAD}", ""))
        rows += [(f"  {name}", _spread(spread)) for name, spread in found.whole_after_s.items()]
    if found.not_whole:
        rows.append(("not whole again after", f"{found.not_whole} faults"))
    return [*rows, ("seconds", f"{found.seconds:.1f}")]


_SPREAD = "(p50 / p99 / max)"


def _spread(spread: Spread) -> str:
    if spread.p50 is None:
        return "none"
    return f"{spread.p50:.2f} / {spread.p99:.2f} / {spread.max:.2f}"
