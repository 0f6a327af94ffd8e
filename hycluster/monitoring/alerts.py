"""The alerts: what somebody is woken for, and what can wait until the morning. Each is in ``docs/runbook.md``.

``page``: callers are not served, or will not be soon. ``ticket``: look at it in working hours.

All rules group by ``namespace`` too, which an operator's Prometheus adds, so that one Prometheus may watch several
installations; elsewhere it is empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from hycluster.settings.objectives import Objectives

RUNBOOK = "docs/runbook.md"
BY = "namespace, model"
# Age of what is not committed, with the default of `ledger.cut_every_s` ten times over.
LEDGER_LATE_S = 600
# Windows of recorded ratios, as burn rates are looked at over a long one and a short one.
WINDOWS = ("5m", "30m", "1h", "6h", "3d")


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule.

    Attributes:
        lasts: for how long it must be so, as Prometheus writes it.
        says: what is wrong, with the labels of the series in it.
    """

    name: str
    promql: str
    lasts: str
    severity: Literal["page", "ticket"]
    says: str


# By the suffix of its name: burn rate, long and short window, how bad that is.
BURN_RATES: dict[str, tuple[float, str, str, Literal["page", "ticket"]]] = {
    # The budget of 30 days would be gone in 2 days, in 5 days, on time.
    "Fast": (14.4, "1h", "5m", "page"),
    "Slow": (6.0, "6h", "30m", "page"),
    "Slowly": (1.0, "3d", "6h", "ticket"),
}
# Nobody waits for rows of batch work, which are asked again.
ONLINE = 'priority="online"'
FAILED = f"hycluster_requests_failed_total{{{ONLINE}}}"
REFUSED_UNAVAILABLE = f'hycluster_requests_refused_total{{reason="unavailable",{ONLINE}}}'
SHED = f'hycluster_requests_refused_total{{reason="overloaded",{ONLINE}}}'
UNANSWERED, LATE = "hycluster:unanswered:ratio_rate", "hycluster:first_token_late:ratio_rate"


def recordings(objectives: Objectives) -> Iterator[dict[str, str]]:
    """Rules that record what the burn rates are made of; later ones read earlier ones."""
    first = "vllm:time_to_first_token_seconds"
    for window in WINDOWS:
        bad, good = f"hycluster:requests_bad:rate{window}", f"hycluster:requests_good:rate{window}"

        def events(counter: str, window: str = window) -> str:
            return f"sum by ({BY}) (rate({counter}[{window}]))"

        # A model that no replica was ever there for has no series of vLLM's.
        none = f"0 * {events(FAILED)}"
        # Those that an engine's error ended are among the failed ones.
        answers = events(f'vllm:request_success_total{{finished_reason!="error",{ONLINE}}}')
        yield {"record": bad, "expr": f"{events(FAILED)} + {events(REFUSED_UNAVAILABLE)}"}
        yield {"record": good, "expr": f"{answers} or {none}"}
        yield {"record": f"{UNANSWERED}{window}", "expr": f"{bad} / ({bad} + {good})"}
        late = f'{first}_bucket{{le="{_bound(objectives)}",{ONLINE}}}'
        yield {"record": f"{LATE}{window}", "expr": f"1 - {events(late)} / {events(f'{first}_count{{{ONLINE}}}')}"}


def _bound(objectives: Objectives) -> str:
    """As vLLM's histogram labels it."""
    seconds = objectives.first_token_s
    return f"{seconds:.1f}" if seconds.is_integer() else f"{seconds:g}"


def _burns(objectives: Objectives) -> Iterator[Alert]:
    for what, recorded, budget, says in (
        (
            "Unanswered", UNANSWERED, 1 - objectives.answered_ratio,
            f"of the requests to {{{{ $labels.model }}}} are not answered; {1 - objectives.answered_ratio:.2%} may be",
        ),
        (
            "FirstTokenLate", LATE, 1 - objectives.first_token_ratio,
            (
                f"of the requests to {{{{ $labels.model }}}} wait longer than {objectives.first_token_s:g} s for their"
                f" first token; {1 - objectives.first_token_ratio:.2%} may"
            ),
        ),
    ):  # fmt: skip
        for suffix, (factor, long, short, severity) in BURN_RATES.items():
            limit = f"{factor:g} * {budget:.6g}"
            yield Alert(
                f"Hycluster{what}{suffix}",
                f"{recorded}{long} > {limit} and {recorded}{short} > {limit}",
                "2m" if severity == "page" else "1h",
                severity,
                f"{{{{ $value | humanizePercentage }}}} {says}.",
            )


def alerts(objectives: Objectives) -> list[Alert]:
    """All of them."""
    return [
        *_burns(objectives),
        Alert(
            "HyclusterSilent",
            "absent(hycluster_replicas_wanted)",
            "5m",
            "page",
            "No ingress process tells of any model: none runs, or Prometheus reaches none.",
        ),
        Alert(
            "HyclusterModelUnavailable",
            f"max by ({BY}) (hycluster_replicas_ready) == 0 and max by ({BY}) (hycluster_replicas_wanted) > 0",
            "1m",
            "page",
            "No replica of {{ $labels.model }} takes requests.",
        ),
        Alert(
            "HyclusterReplicasMissing",
            f"max by ({BY}) (hycluster_replicas_ready) < max by ({BY}) (hycluster_replicas_wanted)",
            "15m",
            "ticket",
            "{{ $labels.model }} has {{ $value }} replicas, fewer than there are to be.",
        ),
        Alert(
            "HyclusterReplicasDying",
            f"max by ({BY}) (increase(hycluster_replicas_lost_total[30m])) >= 3",
            "0m",
            "page",
            "{{ $value | humanize }} replicas of {{ $labels.model }} were lost in half an hour.",
        ),
        Alert(
            "HyclusterReplicaHung",
            f"max by ({BY}, replica) (hycluster_replica_silent_seconds) > 60",
            "0m",
            "page",
            "Replica {{ $labels.replica }} of {{ $labels.model }} has work and has sent nothing for"
            " {{ $value | humanizeDuration }}.",
        ),
        Alert(
            "HyclusterReplicaDoesNotStart",
            f"max by ({BY}) (hycluster_replica_failed_starts) >= 3",
            "0m",
            "ticket",
            "{{ $value }} starts of replicas of {{ $labels.model }} in a row have failed.",
        ),
        Alert(
            "HyclusterKvPressure",
            f"max by ({BY}, replica) (vllm:kv_cache_usage_perc) > 0.95"
            f" and max by ({BY}, replica) (vllm:num_requests_waiting) > 0",
            "15m",
            "ticket",
            "The KV cache of replica {{ $labels.replica }} of {{ $labels.model }} has been full for a while, and"
            " requests wait.",
        ),
        Alert(
            "HyclusterShedding",
            f"sum by ({BY}) (rate({SHED}[10m])) > 0.05 * (sum by ({BY}) (rate({SHED}[10m]))"
            f" + sum by ({BY}) (rate(vllm:request_success_total{{{ONLINE}}}[10m])))",
            "10m",
            "ticket",
            "More than 5% of the requests to {{ $labels.model }} are refused for overload (429).",
        ),
        Alert(
            "HyclusterServerErrors",
            f'sum by ({BY}, handler) (rate(http_requests_total{{status=~"5..", status!="503"}}[10m]))'
            f" > 0.01 * sum by ({BY}, handler) (rate(http_requests_total[10m]))",
            "5m",
            "page",
            "More than 1% of the answers of {{ $labels.handler }} are errors of the service's own.",
        ),
        Alert(
            "HyclusterNothingWakes",
            f"sum by ({BY}) (hycluster_requests_without_replica) > 0",
            "15m",
            "page",
            "Requests to {{ $labels.model }} wait for a replica, and none starts.",
        ),
        Alert(
            "HyclusterBatchLate",
            f"min by ({BY}, batch_job) (hycluster_job_late_deadline_timestamp_seconds) > 0",
            "10m",
            "ticket",
            "Batch {{ $labels.batch_job }} on {{ $labels.model }} will not be through by the end of its window.",
        ),
        Alert(
            "HyclusterCertificateEnds",
            "min by (namespace) (hycluster_certificate_expires_timestamp_seconds > 0) - time() < 14 * 86400",
            "1h",
            "ticket",
            "The certificate of the ingresses ends in {{ $value | humanizeDuration }}.",
        ),
        Alert(
            "HyclusterLedgerBehind",
            f"max by (namespace) (hycluster_ledger_lag_seconds) > {LEDGER_LATE_S}",
            "5m",
            "ticket",
            "What requests have had is in no committed part of the usage ledger for {{ $value | humanizeDuration }}.",
        ),
        Alert(
            "HyclusterLedgerLoses",
            "max by (namespace) (increase(hycluster_ledger_lost_entries_total[10m])) > 0",
            "0m",
            "page",
            "Lines of the usage ledger are given up: a disk takes none.",
        ),
    ]


def rule_groups(objectives: Objectives) -> list[dict[str, Any]]:
    """As a rule file of Prometheus has them, and a PrometheusRule's ``spec``."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.promql,
            "for": alert.lasts,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.says, "runbook": f"{RUNBOOK}#{alert.name.lower()}"},
        }
        for alert in alerts(objectives)
    ]
    return [
        {"name": "hycluster-objectives", "interval": "30s", "rules": list(recordings(objectives))},
        {"name": "hycluster", "interval": "30s", "rules": rules},
    ]


def prometheus_rule(objectives: Objectives) -> dict[str, Any]:
    """The manifest for Prometheus' operator."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "hycluster"},
        "spec": {"groups": rule_groups(objectives)},
    }
