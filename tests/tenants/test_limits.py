from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hycluster.auth.database import VARIABLE
from hycluster.cli import app
from hycluster.errors import HyclusterError


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["limits", *arguments])
    if isinstance(done.exception, HyclusterError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_set_add_to_and_removed() -> None:
    assert run("set", "--project", "p", "--requests-per-minute", "60", "--budget-per-month", "12.5") == (
        "project default/p: requests_per_minute 60, budget_per_month 12.5\n"
    )
    run("set", "--project", "p", "--tokens-per-minute", "1000", "--requests-per-minute", "30")
    run("set", "--tenant", "acme", "--concurrent-requests", "4", "--model", "m")
    (model, project) = json.loads(run("list", "--json"))[::-1]
    assert project == {
        "tenant": "default", "project": "p", "key": None, "model": None, "requests_per_minute": 30,
        "tokens_per_minute": 1000, "tokens_per_day": None, "concurrent_requests": None, "budget_per_month": 12.5,
    }  # fmt: skip
    assert (model["tenant"], model["project"], model["model"], model["concurrent_requests"]) == ("acme", None, "m", 4)
    assert json.loads(run("list", "--tenant", "acme", "--json")) == [model]
    assert "12.5" in run("list")
    run("remove", "--tenant", "acme", "--model", "m", "--yes")
    assert json.loads(run("list", "--json")) == [project]
    audit = json.loads(CliRunner().invoke(app, ["keys", "audit", "--json"]).stdout)
    assert [(line["action"], line["subject"]) for line in audit] == [
        ("limit.set", "project:default/p"),
        ("limit.set", "project:default/p"),
        ("limit.set", "tenant:acme|m"),
        ("limit.removed", "tenant:acme|m"),
    ]
    assert audit[1]["detail"] == {"requests_per_minute": 30, "tokens_per_minute": 1000, "budget_per_month": 12.5e9}


def test_what_was_set_is_said_to_the_last_figure() -> None:
    assert run("set", "--project", "p", "--tokens-per-day", "1000000", "--tokens-per-minute", "1234567") == (
        "project default/p: tokens_per_minute 1234567, tokens_per_day 1000000\n"
    )
    said = run("set", "--tenant", "acme", "--budget-per-month", "1234567.5", "--requests-per-minute", "600")
    assert said == "tenant acme: requests_per_minute 600, budget_per_month 1234567.5\n"


def test_of_a_key() -> None:
    made = json.loads(CliRunner().invoke(app, ["keys", "create", "--project", "p", "--json"]).stdout)
    run("set", "--key", made["id"], "--tokens-per-day", "5")
    (limit,) = json.loads(run("list", "--project", "p", "--json"))
    assert (limit["key"], limit["tokens_per_day"]) == (made["id"], 5)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("set", "--requests-per-minute", "1"), "whose? Give --project NAME"),
        (("set", "--project", "p"), "needs at least one limit"),
        (("set", "--project", "a/b", "--tokens-per-day", "1"), "--project: 'a/b' is not allowed"),
        (("set", "--key", "key_x", "--tokens-per-day", "1"), "there is no key 'key_x'"),
        (("set", "--key", "key_x", "--project", "p", "--tokens-per-day", "1"), "--key: is not allowed with --project"),
        (("set", "--project", "p", "--budget-per-month", "nan"), "--budget-per-month: 'nan' is not allowed"),
        (("remove", "--project", "p", "--yes"), "there is none of 'project:default/p'"),
    ],
)
def test_what_is_wrong_is_named(command: tuple[str, ...], says: str) -> None:
    with pytest.raises(HyclusterError, match=re.escape(says)):
        run(*command)
