"""Each alert fires when its fault is there, and only then: by promtool, on series as the fault makes them.

That a fault makes such series is shown in ``test_faults.py``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hycluster.cli import app
from hycluster.monitoring.alerts import alerts, rule_groups
from hycluster.observe.catalogue import CATALOGUE, names_in
from hycluster.settings.objectives import Objectives

ROOT = Path(__file__).parents[2]
OBJECTIVES = Objectives()


def refused(reason: str, values: str, priority: str = "online") -> tuple[str, str]:
    return f'hycluster_requests_refused_total{{model="m",reason="{reason}",priority="{priority}",ingress="i"}}', values


def answered(values: str, reason: str = "stop", priority: str = "online") -> tuple[str, str]:
    return (
        f'vllm:request_success_total{{model="m",finished_reason="{reason}",priority="{priority}",replica="r",ingress="i"}}',
        values,
    )


def failed(values: str, priority: str = "online") -> tuple[str, str]:
    return (
        f'hycluster_requests_failed_total{{model="m",reason="ReplicaLost",priority="{priority}",ingress="i"}}',
        values,
    )


def broken(values: str) -> list[tuple[str, str]]:
    """Ended by an engine's error, which vLLM counts too."""
    ours = 'hycluster_requests_failed_total{model="m",reason="RequestFailed",priority="online",ingress="i"}'
    return [(ours, values), answered(values, "error")]


def first_tokens(within: str, all_of_them: str, priority: str = "online") -> list[tuple[str, str]]:
    name, of = "vllm:time_to_first_token_seconds", f'model="m",priority="{priority}"'
    return [(f'{name}_bucket{{{of},le="2.5"}}', within), (f"{name}_count{{{of}}}", all_of_them)]


def of_model(name: str, values: str, labels: str = "") -> tuple[str, str]:
    return f'{name}{{model="m"{labels}}}', values


@dataclass(frozen=True)
class Case:
    """Series with the fault and without; of ``at`` the alert is asked, by the labels that it then has."""

    fault: list[tuple[str, str]]
    calm: list[tuple[str, str]]
    at: str
    labels: Mapping[str, str] = field(default_factory=lambda: {"model": "m"})
    interval: str = "1m"


HOUR, HALF_DAY, DAYS = "70", "80", "76"
CASES: dict[str, Case] = {
    # 10% of the requests, of which 0.5% may be.
    "HyclusterUnansweredFast": Case(
        [failed(f"0+10x{HOUR}"), refused("unavailable", f"0x{HOUR}"), answered(f"0+90x{HOUR}")],
        # Of rows of batch work, which are asked again, all may fail.
        [
            *(failed(f"0+1x{HOUR}"), refused("unavailable", f"0x{HOUR}"), answered(f"0+999x{HOUR}")),
            *(failed(f"0+9x{HOUR}", "batch"), refused("unavailable", f"0+900x{HOUR}", "batch")),
        ],
        "68m",
    ),
    # No replica at all: nothing of vLLM's to be seen.
    "HyclusterUnansweredSlow": Case(
        [failed(f"0x{HALF_DAY}"), refused("unavailable", f"0+5x{HALF_DAY}")],
        [failed(f"0x{HALF_DAY}"), refused("unavailable", f"0x{HALF_DAY}"), refused("overloaded", f"0+9x{HALF_DAY}")],
        "390m",
        interval="5m",
    ),
    "HyclusterUnansweredSlowly": Case(
        [refused("unavailable", f"0x{DAYS}"), answered(f"0+99x{DAYS}"), *broken(f"0+1x{DAYS}")],
        # Half of what may be: one that were counted twice would be all of it.
        [refused("unavailable", f"0x{DAYS}"), answered(f"0+299x{DAYS}"), *broken(f"0+1x{DAYS}")],
        "74h",
        interval="1h",
    ),
    "HyclusterFirstTokenLateFast": Case(
        first_tokens(f"0+10x{HOUR}", f"0+100x{HOUR}"),
        # Rows of batch work wait for hours, and nobody waits for them.
        [
            *first_tokens(f"0+96x{HOUR}", f"0+100x{HOUR}"),
            *first_tokens(f"0x{HOUR}", f"0+1000x{HOUR}", "batch"),
        ],
        "68m",
    ),
    "HyclusterFirstTokenLateSlow": Case(
        first_tokens(f"0+60x{HALF_DAY}", f"0+100x{HALF_DAY}"), first_tokens(f"0+75x{HALF_DAY}", f"0+100x{HALF_DAY}"),
        "390m",
        interval="5m",
    ),
    "HyclusterFirstTokenLateSlowly": Case(
        first_tokens(f"0+94x{DAYS}", f"0+100x{DAYS}"), first_tokens(f"0+96x{DAYS}", f"0+100x{DAYS}"), "74h",
        interval="1h",
    ),
    "HyclusterSilent": Case(
        [("other", "1x30")], [of_model("hycluster_replicas_wanted", "2x30")], "20m", labels={}
    ),
    "HyclusterModelUnavailable": Case(
        [of_model("hycluster_replicas_ready", "0x30"), of_model("hycluster_replicas_wanted", "2x30")],
        # One that sleeps is not to be there.
        [of_model("hycluster_replicas_ready", "0x30"), of_model("hycluster_replicas_wanted", "0x30")],
        "20m",
    ),
    "HyclusterReplicasMissing": Case(
        [of_model("hycluster_replicas_ready", "1x30"), of_model("hycluster_replicas_wanted", "2x30")],
        # A start takes its time.
        [of_model("hycluster_replicas_ready", "1x8 2x22"), of_model("hycluster_replicas_wanted", "2x30")],
        "20m",
    ),
    # Both ingress processes see each loss.
    "HyclusterReplicasDying": Case(
        [of_model("hycluster_replicas_lost_total", "0x5 1x5 2x5 3x5 4x5", f',ingress="{name}"') for name in "ij"],
        [of_model("hycluster_replicas_lost_total", "0x5 1x5 2x15", f',ingress="{name}"') for name in "ij"],
        "26m",
    ),
    "HyclusterReplicaHung": Case(
        [of_model("hycluster_replica_silent_seconds", "0+60x10", ',replica="r",ingress="i"')],
        [of_model("hycluster_replica_silent_seconds", "0x5 40x5", ',replica="r",ingress="i"')],
        "5m",
        labels={"model": "m", "replica": "r"},
    ),
    "HyclusterReplicaDoesNotStart": Case(
        [of_model("hycluster_replica_failed_starts", "0 1 2 3 4")],
        [of_model("hycluster_replica_failed_starts", "0 1 2 0 1")],
        "4m",
    ),
    "HyclusterKvPressure": Case(
        [of_model("vllm:kv_cache_usage_perc", "0.99x30", ',replica="r"'),
         of_model("vllm:num_requests_waiting", "4x30", ',replica="r"')],
        # Full, and nobody waits.
        [of_model("vllm:kv_cache_usage_perc", "0.99x30", ',replica="r"'),
         of_model("vllm:num_requests_waiting", "0x30", ',replica="r"')],
        "25m",
        labels={"model": "m", "replica": "r"},
    ),
    "HyclusterShedding": Case(
        [refused("overloaded", "0+10x40"), answered("0+90x40")],
        [refused("overloaded", "0+1x40"), answered("0+90x40")],
        "35m",
    ),
    "HyclusterServerErrors": Case(
        [of_model("http_requests_total", "0+5x40", ',handler="/v1/completions",status="500"'),
         of_model("http_requests_total", "0+95x40", ',handler="/v1/completions",status="200"')],
        [of_model("http_requests_total", "0+5x40", ',handler="/v1/completions",status="503"'),
         of_model("http_requests_total", "0+95x40", ',handler="/v1/completions",status="429"')],
        "35m",
        labels={"model": "m", "handler": "/v1/completions"},
    ),
    "HyclusterNothingWakes": Case(
        [of_model("hycluster_requests_without_replica", "3x30", ',ingress="i"')],
        # While one starts.
        [of_model("hycluster_requests_without_replica", "3x10 0x20", ',ingress="i"')],
        "25m",
    ),
    "HyclusterCertificateEnds": Case(
        # The thirteenth day after the beginning, and the thirtieth; none at all.
        [("hycluster_certificate_expires_timestamp_seconds{ingress=\"i\"}", f"{13 * 86400}x150"),
         ("hycluster_certificate_expires_timestamp_seconds{ingress=\"j\"}", f"{30 * 86400}x150")],
        [("hycluster_certificate_expires_timestamp_seconds{ingress=\"i\"}", f"{30 * 86400}x150"),
         ("hycluster_certificate_expires_timestamp_seconds{ingress=\"j\"}", "0x150")],
        "2h",
        labels={},
    ),
    "HyclusterLedgerBehind": Case(
        [("hycluster_ledger_lag_seconds{ingress=\"i\"}", "0+60x30"),
         ("hycluster_ledger_lag_seconds{ingress=\"j\"}", "30x30")],
        # Away for a while, and back.
        [("hycluster_ledger_lag_seconds{ingress=\"i\"}", "0+60x12 0x18")],
        "20m",
        labels={},
    ),
    "HyclusterLedgerLoses": Case(
        [("hycluster_ledger_lost_entries_total{ingress=\"i\"}", "0x5 7x10")],
        [("hycluster_ledger_lost_entries_total{ingress=\"i\"}", "7x15")],
        "8m",
        labels={},
    ),
    "HyclusterBatchLate": Case(
        [of_model("hycluster_job_late_deadline_timestamp_seconds", "1700000000x30", ',batch_job="b"')],
        # It has caught up.
        [of_model("hycluster_job_late_deadline_timestamp_seconds", "1700000000x5 stale", ',batch_job="b"')],
        "20m",
        labels={"model": "m", "batch_job": "b"},
    ),
}  # fmt: skip


def test_every_alert_has_a_case() -> None:
    assert set(CASES) == {alert.name for alert in alerts(OBJECTIVES)}


def test_each_fires_by_its_fault_and_by_nothing_else(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool (Debian's package prometheus)")
    recorded, found = (group["rules"] for group in rule_groups(OBJECTIVES))
    files = []
    for name, case in CASES.items():
        (rule,) = (each for each in found if each["alert"] == name)
        labels = {"severity": rule["labels"]["severity"], **case.labels}
        # What it reads and no more: each rule is evaluated at each moment. What it says has values in it.
        needed = _needed(recorded, rule["expr"])
        group = {"name": name, "interval": case.interval, "rules": [*needed, rule | {"annotations": {}}]}
        (tmp_path / f"{name}.rules.yml").write_text(yaml.safe_dump({"groups": [group]}))
        tests = [
            {
                "interval": case.interval,
                "input_series": [{"series": one, "values": values} for one, values in series],
                "alert_rule_test": [{"eval_time": case.at, "alertname": name, "exp_alerts": fires}],
            }
            for series, fires in ((case.fault, [{"exp_labels": labels, "exp_annotations": {}}]), (case.calm, []))
        ]
        whole = {"rule_files": [f"{name}.rules.yml"], "evaluation_interval": case.interval, "tests": tests}
        files.append(f"{name}.yml")
        (tmp_path / files[-1]).write_text(yaml.safe_dump(whole))
    done = subprocess.run(
        [promtool, "test", "rules", *files], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _needed(recorded: list[dict[str, str]], promql: str) -> list[dict[str, str]]:
    """Rules that record what an expression reads, and what those read."""
    needed: list[dict[str, str]] = []
    for rule in reversed(recorded):
        if any(re.search(rf"{rule['record']}\b", reads) for reads in [promql, *(each["expr"] for each in needed)]):
            needed.insert(0, rule)
    return needed


def test_all_that_they_ask_for_is_there() -> None:
    asked = {name for rule in rule_groups(OBJECTIVES) for one in rule["rules"] for name in names_in(one["expr"])}
    ours = {name for name in asked if not name.startswith("vllm:")}
    assert ours <= set(CATALOGUE)
    assert ours


def test_each_says_of_which_series_it_speaks() -> None:
    for alert in alerts(OBJECTIVES):
        said = set(re.findall(r"\$labels\.(\w+)", alert.says))
        assert said <= {"model", "replica", "handler", "batch_job"}
        assert all(re.search(rf"\b{label}\b", alert.promql) or "ratio_rate" in alert.promql for label in said)


def test_each_has_an_entry_in_the_runbook() -> None:
    runbook = (ROOT / "docs/runbook.md").read_text()
    headings = re.findall(r"^### (Hycluster\w+)$", runbook, re.MULTILINE)
    assert headings == [alert.name for alert in alerts(OBJECTIVES)]
    for rule in rule_groups(OBJECTIVES)[1]["rules"]:
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"


def test_other_objectives() -> None:
    (bound,) = {
        found
        for rule in rule_groups(Objectives(answered_ratio=0.999, first_token_s=1.0, first_token_ratio=0.99))[0]["rules"]
        for found in re.findall(r'le="([^"]+)"', rule["expr"])
    }
    assert bound == "1.0"
    asked = ["--set", "objectives.answered_ratio=0.999", "--set", "objectives.first_token_s=1"]
    done = CliRunner().invoke(app, ["metrics", "rules", *asked])
    assert done.exit_code == 0
    assert "14.4 * 0.001" in done.stdout
    assert 'le="1.0"' in done.stdout


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("first_token_s", "3", "objectives.first_token_s: 3.* is not allowed; must be a bound of .* 0.1, 0.25, "),
        ("answered_ratio", "1", "objectives.answered_ratio: 1 is not allowed: .* less than 1"),
        ("first_token_ratio", "-1", "objectives.first_token_ratio: -1 is not allowed"),
    ],
)
def test_objectives_that_nobody_can_keep(field: str, value: str, says: str) -> None:
    done = CliRunner().invoke(app, ["metrics", "rules", "--set", f"objectives.{field}={value}"])
    assert done.exit_code != 0
    assert re.search(says, str(done.exception))
