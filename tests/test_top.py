"""``hycluster status`` and ``top`` over a made look; over a real one: test_start and test_ingress of integration."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import ray
import typer
from ray import serve
from typer.testing import CliRunner

from hycluster import cluster
from hycluster import top as commands
from hycluster.directory.directory import Overview
from hycluster.errors import SettingsError
from hycluster.serving import ray_state
from hycluster.serving.ray_state import Deployment, Look, ServiceProcess
from hycluster.state.cluster_state import ClusterState
from tests.state.made import BIG, SMALL, made_state, made_survey

RUNNER = CliRunner()
DEPLOYMENTS = {
    "replica-tencent-hunyuan-a13b-instruct": Deployment(4, "UPDATING", ""),
    "replica-smollm2-135m-instruct": Deployment(1, "HEALTHY", ""),
    "ingress": Deployment(1, "HEALTHY", ""),
}
INGRESS = {"i": ServiceProcess("ingress", "i", 1, "10.0.0.1", "i")}
LOOK = Look("c", DEPLOYMENTS, INGRESS, made_survey().overview, {"n": "10.0.0.1"})


class Answer:
    """What Serve's handle gives."""

    def __init__(self, answer: Callable[[], ClusterState]) -> None:
        self._answer = answer
        self.cluster_state = self

    def remote(self) -> Answer:
        return self

    def result(self, timeout_s: float) -> ClusterState:
        return self._answer()


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setattr(cluster, "join_cluster", lambda address: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    app = typer.Typer()
    app.command()(commands.status)
    app.command()(commands.top)
    return app


def found(monkeypatch: pytest.MonkeyPatch, look: Look, answer: Callable[[], ClusterState]) -> None:
    monkeypatch.setattr(ray_state, "look", lambda *_: look)
    monkeypatch.setattr(serve, "get_app_handle", lambda _: Answer(answer))


def test_something_is_missing(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, LOOK, made_state)
    done = RUNNER.invoke(app, ["status"])
    assert done.exit_code == 1
    for part in ("degraded", BIG, "ingress processes: 1 of 1 there", "nodes: 1 (10.0.0.1)"):
        assert part in done.stdout
    done = RUNNER.invoke(app, ["status", "--json"])
    assert (done.exit_code, json.loads(done.stdout)) == (1, json.loads(json.dumps(made_state().told())))


def test_all_is_well(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replace(LOOK, overview=Overview(7, {BIG: 4, SMALL: 1}))
    found(monkeypatch, whole, lambda: replace(made_state(), state="ready"))
    assert RUNNER.invoke(app, ["status"]).exit_code == 0
    # What only Ray knows counts too.
    found(monkeypatch, replace(whole, controller=None), lambda: replace(made_state(), state="ready"))
    done = RUNNER.invoke(app, ["status"])
    assert (done.exit_code, "Serve's controller: does not answer" in done.stdout) == (1, True)


def late() -> ClusterState:
    raise TimeoutError


@pytest.mark.parametrize("look", [LOOK, replace(LOOK, processes={})], ids=["late", "none"])
def test_no_ingress_process_answers_and_the_directory_does(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch, look: Look
) -> None:
    found(monkeypatch, look, late)

    class Directory:
        survey = type("", (), {"remote": staticmethod(lambda: "ref")})

    monkeypatch.setattr("hycluster.directory.directory.find_directory", lambda: Directory)
    monkeypatch.setattr(ray, "get", lambda ref, timeout: made_survey())
    done = RUNNER.invoke(app, ["status", "--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["state"], told["batches"]) == (1, "degraded", None)
    assert [pool["model"] for pool in told["pools"]] == [SMALL, BIG]


def test_nothing_answers(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, replace(LOOK, overview=None, processes={}), late)
    done = RUNNER.invoke(app, ["status"])
    assert (done.exit_code, "directory: does not answer" in done.stdout) == (1, True)


def test_nothing_runs(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, replace(LOOK, deployments=None), late)
    error = RUNNER.invoke(app, ["status"]).exception
    assert isinstance(error, SettingsError)
    assert error.exit_code == 2


def test_top_without_a_terminal(app: typer.Typer) -> None:
    error = RUNNER.invoke(app, ["top"]).exception
    assert isinstance(error, SettingsError)
    assert "needs a terminal" in error.message


def test_top_until_ctrl_c(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, LOOK, made_state)
    looks: list[Any] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(commands, "_on_a_terminal", lambda: True)
    done = RUNNER.invoke(app, ["top", "--every", "0.5"])
    assert (done.exit_code, looks) == (130, [0.5] * 3)
