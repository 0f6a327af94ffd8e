from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hycluster.access.api_key import digest, is_whole
from hycluster.access.database import VARIABLE, open_database
from hycluster.access.store import KeyStore
from hycluster.cli import app
from hycluster.errors import HyclusterError
from hycluster.settings.access import Access

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command on a home of its own and returns what it printed; its errors are raised."""
    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> str:
        done = CliRunner().invoke(app, arguments)
        if isinstance(done.exception, HyclusterError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    return command


def test_from_a_project_to_its_end(run: Run) -> None:
    assert run("projects", "create", "acme/search").endswith(" acme/search\n")
    secret = run(
        "keys", "create", "acme/search", "laptop", "--model", "m", "--scope", "batch", "--expires", "90d"
    ).strip()
    assert is_whole(secret)
    made: Any = json.loads(run("keys", "create", "acme/search", "ci", "--json"))
    assert is_whole(made["key"])
    (first, second) = json.loads(run("keys", "list", "acme/search", "--json"))
    assert (first["name"], first["models"], first["scopes"]) == ("laptop", ["m"], ["batch"])
    assert first["expires_at"] - first["created_at"] == pytest.approx(90 * 86400, abs=2)
    assert (second["id"], second["models"], second["expires_at"]) == (made["id"], None, None)
    assert "laptop" in run("keys", "list")
    assert json.loads(run("keys", "list", "acme/other", "--json")) == []
    run("keys", "revoke", first["id"], "--yes")
    rotated = run("keys", "rotate", made["id"], "--keep", "24h", "--yes").strip()
    known = KeyStore(open_database(Access())).known_keys().callers
    assert known.keys() == {digest(made["key"]), digest(rotated)}
    run("projects", "archive", "acme/search", "--yes")
    assert KeyStore(open_database(Access())).known_keys().callers == {}
    (project,) = json.loads(run("projects", "list", "--json"))
    assert project["archived_at"]
    audit = json.loads(run("keys", "audit", "--json"))
    assert [line["action"].split(".")[1] for line in audit] == [
        "created", "created", "created", "revoked", "created", "expires", "archived",
    ]  # fmt: skip
    assert all(re.fullmatch(r"cli \S+", line["actor"]) for line in audit)
    shown = run("keys", "list") + run("keys", "list", "--json") + run("keys", "audit") + run("projects", "list")
    for each in (secret, made["key"], rotated):
        assert each not in shown
        assert digest(each).hex() not in shown


def test_it_asks_before_it_ends_something(run: Run) -> None:
    run("projects", "create", "acme/search")
    made = json.loads(run("keys", "create", "acme/search", "ci", "--json"))
    for command in (
        ("keys", "revoke", made["id"]),
        ("keys", "rotate", made["id"]),
        ("projects", "archive", "acme/search"),
    ):
        with pytest.raises(HyclusterError, match="--yes: must be given where there is no terminal"):
            run(*command)
    assert len(KeyStore(open_database(Access())).known_keys().callers) == 1


def test_the_database_of_a_settings_file(run: Run, tmp_path: Path) -> None:
    settings = f"models: [{{name: m, source: x}}]\naccess: {{database: 'sqlite:///{tmp_path / 'other.db'}'}}\n"
    (tmp_path / "s.yaml").write_text(settings)
    assert run("keys", "migrate", "--config", "s.yaml") == "the database of keys is now of this version\n"
    assert run("keys", "migrate", "--config", "s.yaml") == "the database of keys is of this version\n"
    assert (tmp_path / "other.db").exists()
    assert not (tmp_path / "keys.db").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("projects", "create", "acme"), "TENANT/PROJECT: 'acme' is not allowed; must be two names"),
        (("projects", "create", "acme/a b"), "project: 'a b' is not allowed"),
        (("keys", "create", "no/such", "k"), "there is no project 'no/such'"),
        (("keys", "create", "no/such", "k", "--expires", "soon"), "--expires: 'soon' is not allowed"),
        (("keys", "revoke", "key_x", "--yes"), "there is no key 'key_x'"),
    ],
)
def test_what_is_wrong_is_named(run: Run, command: tuple[str, ...], says: str) -> None:
    with pytest.raises(HyclusterError, match=re.escape(says)):
        run(*command)
