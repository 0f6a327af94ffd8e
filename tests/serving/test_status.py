from __future__ import annotations

from dataclasses import replace

import pytest

from hycluster.directory.directory import Overview
from hycluster.errors import SettingsError
from hycluster.pool_health import StartTrouble
from hycluster.serving.ray_state import Deployment, Look, ServiceProcess
from hycluster.serving.status import status_lines

DEPLOYMENTS = {
    "replica-org-big-1": Deployment(2, "HEALTHY", ""),
    "ingress": Deployment(1, "HEALTHY", ""),
    "batches": Deployment(1, "HEALTHY", ""),
}
PROCESSES = {name: ServiceProcess(name, name, 1, "10.0.0.1", name) for name in ("ingress", "batches")}
FINE = Look("c", DEPLOYMENTS, PROCESSES, Overview(7, {"Org/Big.1": 2}), {"n": "10.0.0.1"})


def test_all_is_well() -> None:
    assert status_lines(FINE) == (
        [
            "model Org/Big.1: 2 of 2 replicas serve",
            "ingress processes: 1 of 1 there",
            "batch executor: 1 of 1 there",
            "Serve's controller: there",
            "directory: there (pid 7)",
            "nodes: 1 (10.0.0.1)",
        ],
        True,
    )


def test_a_model_that_does_not_start_says_why() -> None:
    trouble = StartTrouble(3, "EngineStartFailed", "no memory", 4.0)
    lines, well = status_lines(replace(FINE, overview=Overview(7, {"Org/Big.1": 1}, {"Org/Big.1": trouble})))
    assert not well
    assert lines[0] == (
        "model Org/Big.1: 1 of 2 replicas serve; 3 starts of replicas failed: no memory; next try in 4 s"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"controller": None, "deployments": None}, "Serve's controller: does not answer"),
        ({"overview": None}, "directory: does not answer"),
        ({"processes": {}}, "ingress processes: 0 of 1 there"),
    ],
)
def test_what_is_missing(change: dict[str, object], says: str) -> None:
    lines, well = status_lines(replace(FINE, **change))  # type: ignore[arg-type]
    assert not well
    assert says in lines


def test_nothing_runs() -> None:
    with pytest.raises(SettingsError, match="no hycluster is running"):
        status_lines(replace(FINE, deployments=None))
