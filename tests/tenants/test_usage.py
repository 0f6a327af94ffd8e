from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hycluster.cli import app
from hycluster.errors import HyclusterError, Unavailable
from hycluster.ledger.books import Books, open_books
from hycluster.serving.running import forget, remember, remember_service
from tests.ledger.entries import entry

Usage = Callable[..., Any]


@pytest.fixture
def usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Usage:
    """Runs the command on a home of its own and returns what it told as JSON; its errors are raised."""
    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str, as_json: bool = True) -> Any:
        done = CliRunner().invoke(app, ["usage", *arguments, *(["--json"] if as_json else [])])
        if isinstance(done.exception, HyclusterError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout) if as_json else done.stdout

    return command


def test_sums_of_the_home_s_own_ledger(usage: Usage, tmp_path: Path) -> None:
    assert usage() == []
    now = time.time()
    open_books(str(tmp_path / "batches/ledger")).commit(
        "a", [entry(ended_at=now), entry(ended_at=now - 7200, tier="batch"), entry(project="chat", ended_at=now)]
    )
    assert usage() == [
        {"project": "chat", "model": "m", "requests": 1, "input_tokens": 10, "cached_tokens": 4, "output_tokens": 5,
         "cost": 0.25},
        {"project": "search", "model": "m", "requests": 2, "input_tokens": 20, "cached_tokens": 8, "output_tokens": 10,
         "cost": 0.5},
    ]  # fmt: skip
    (mine,) = usage("--by", "tenant,key", "--since", "1h")
    assert (mine["tenant"], mine["key"], mine["key_name"], mine["requests"]) == ("acme", "key_1", "ci", 2)
    assert [each["tier"] for each in usage("--by", "tier")] == ["batch", "online"]
    assert sum(each["requests"] for each in usage("--by", "day", "--since", "2026-01-01")) == 3
    shown = [line.split() for line in usage("--by", "project", as_json=False).splitlines()]
    assert shown[1:] == [["chat", "1", "10", "4", "5", "0.25"], ["search", "2", "20", "8", "10", "0.5"]]


def test_what_is_wrong_is_said(usage: Usage) -> None:
    for arguments, says in ((("--by", "user"), "--by: 'user'"), (("--since", "2026-1-32"), "must be a day")):
        with pytest.raises(HyclusterError, match=says):
            usage(*arguments)


def test_a_ledger_that_can_not_be_read_is_named(usage: Usage, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: Books) -> list[str]:
        raise OSError("the bucket does not answer")

    monkeypatch.setattr(Books, "days", away)
    with pytest.raises(Unavailable, match=r"ledger\.store: \S+/ledger can't be read: the bucket does not answer"):
        usage()


def test_an_empty_ledger_that_is_off_says_so(usage: Usage, tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["usage", *arguments])
        assert done.exit_code == 0, done.output
        return done.stderr

    assert "ledger is off" in said()
    kept = "models: [{name: m, source: x}]\nledger: {enabled: true}\n"
    (tmp_path / "kept.yaml").write_text(kept)
    assert said("--config", "kept.yaml", "--since", "1h").startswith("no request since 1h is in ")
    assert "is off" not in said("--config", "kept.yaml")
    remember("127.0.0.1:6379")
    for ledger, off in (("", True), (str(tmp_path / "elsewhere"), False), (None, False)):
        remember_service(["m"], None, ledger)
        assert ("ledger is off" in said()) == off, ledger
    forget()
    open_books(str(tmp_path / "batches/ledger")).commit("a", [entry()])
    assert not said()


def test_the_ledger_of_the_running_service_or_of_a_settings_file(usage: Usage, tmp_path: Path) -> None:
    place = str(tmp_path / "elsewhere")
    open_books(place).commit("a", [entry()])
    assert usage() == []
    remember("127.0.0.1:6379")
    remember_service(["m"], None, place)
    assert [each["requests"] for each in usage()] == [1]
    forget()
    assert usage() == []
    (tmp_path / "s.yaml").write_text(f"models: [{{name: m, source: x}}]\nledger: {{store: '{place}'}}\n")
    assert [each["requests"] for each in usage("--config", "s.yaml")] == [1]
