from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hycluster.auth.api_key import digest, is_whole
from hycluster.auth.certificate import certificate_digest
from hycluster.auth.database import VARIABLE, database_url, open_database
from hycluster.auth.store import KeyStore
from hycluster.cli import app
from hycluster.errors import HyclusterError
from hycluster.serving.running import forget, remember, remember_service
from hycluster.settings.auth import Auth

Run = Callable[..., str]
ACME = ("--tenant", "acme")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command on a home of its own and returns what it printed; its errors are raised."""
    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    # Which pytest's workers have.
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> str:
        done = CliRunner().invoke(app, arguments)
        if isinstance(done.exception, HyclusterError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    return command


def test_from_a_project_to_its_end(run: Run) -> None:
    assert run("projects", "create", "search", *ACME).endswith(" acme/search\n")
    secret = run(
        "keys",
        "create",
        "--project",
        "search",
        *ACME,
        "--name",
        "laptop",
        "--model",
        "m",
        "--scope",
        "batch",
        "--expires",
        "90d",
    ).strip()
    assert is_whole(secret)
    made: Any = json.loads(run("keys", "create", "--project", "search", *ACME, "--name", "ci", "--json"))
    assert is_whole(made["key"])
    (first, second) = json.loads(run("keys", "list", "--project", "search", *ACME, "--json"))
    assert (first["name"], first["models"], first["scopes"]) == ("laptop", ["m"], ["batch"])
    assert first["expires_at"] - first["created_at"] == pytest.approx(90 * 86400, abs=2)
    assert (second["id"], second["models"], second["expires_at"]) == (made["id"], None, None)
    assert "laptop" in run("keys", "list")
    assert json.loads(run("keys", "list", "--project", "other", "--json")) == []
    run("keys", "revoke", first["id"], "--yes")
    rotated = run("keys", "rotate", made["id"], "--keep", "24h", "--yes").strip()
    known = KeyStore(open_database(Auth())).known_keys().callers
    assert known.keys() == {digest(made["key"]), digest(rotated)}
    run("projects", "archive", "search", *ACME, "--yes")
    assert KeyStore(open_database(Auth())).known_keys().callers == {}
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
    made = json.loads(run("keys", "create", "--project", "search", *ACME, "--name", "ci", "--json"))
    for command in (
        ("keys", "rotate", made["id"]),
        ("projects", "archive", "search", *ACME),
    ):
        with pytest.raises(HyclusterError, match="--yes: must be given where there is no terminal"):
            run(*command)
    assert len(KeyStore(open_database(Auth())).known_keys().callers) == 1
    # What is not done is not said as if it were.
    said = CliRunner().invoke(app, ["projects", "archive", "search", *ACME]).stderr
    assert said == "project acme/search will be archived, and its 1 keys dead, for ever\n"


def test_ids_are_whole_on_a_narrow_screen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = json.loads(run("keys", "create", "--project", "search", "--model", "smollm2-135m-instruct", "--json"))
    monkeypatch.setenv("COLUMNS", "80")
    assert made["id"] in run("keys", "list").split()
    monkeypatch.delenv("COLUMNS")
    assert len(run("keys", "list").splitlines()) == 2


def test_what_has_ended_does_not_end_again(run: Run) -> None:
    made = json.loads(run("keys", "create", "--project", "search", "--json"))
    run("keys", "revoke", made["id"])
    (revoked,) = json.loads(run("keys", "list", "--json"))
    run("keys", "revoke", made["id"])
    run("projects", "archive", "search", "--yes")
    # Asks nothing: there is nothing to be done.
    run("projects", "archive", "search")
    assert json.loads(run("keys", "list", "--json")) == [revoked]
    # Who did it is told once.
    audit = [line["action"] for line in json.loads(run("keys", "audit", "--json"))]
    assert audit == ["project.created", "key.created", "key.revoked", "project.archived"]


def test_a_key_that_was_found_is_revoked_by_itself(run: Run) -> None:
    made = json.loads(run("keys", "create", "--project", "search", "--json"))
    run("keys", "create", "--project", "search")
    done = CliRunner().invoke(app, ["keys", "revoke", made["key"]])
    assert done.exit_code == 0
    assert f"key {made['id']}, 'key' of default/search, will be revoked" in done.stderr
    assert [key["revoked_at"] is None for key in json.loads(run("keys", "list", "--json"))] == [False, True]
    # No message shows one.
    for command in (
        ("keys", "revoke", made["key"][:-1] + "-"),
        ("limits", "set", "--key", made["key"], "--tokens-per-day", "1"),
    ):
        with pytest.raises(HyclusterError) as error:
            run(*command)
        assert made["key"][:-1] not in error.value.message


def test_a_key_that_has_expired_has_no_successor(run: Run) -> None:
    store = KeyStore(open_database(Auth()))
    run("projects", "create", "search")
    made, _ = store.create_key(store.project("default", "search"), "ci", expires_at=int(time.time()) - 1)
    with pytest.raises(HyclusterError, match="has expired; create another one"):
        run("keys", "rotate", made.id, "--yes")
    assert len(store.all_keys()) == 1


def test_the_database_of_a_settings_file(run: Run, tmp_path: Path) -> None:
    settings = f"models: [{{name: m, source: x}}]\nauth: {{database: 'sqlite:///{tmp_path / 'other.db'}'}}\n"
    (tmp_path / "s.yaml").write_text(settings)
    assert run("keys", "migrate", "--config", "s.yaml") == "the database of keys is now of this version\n"
    assert run("keys", "migrate", "--config", "s.yaml") == "the database of keys is of this version\n"
    assert (tmp_path / "other.db").exists()
    assert not (tmp_path / "keys.db").exists()


def test_a_project_is_made_with_its_first_key(run: Run) -> None:
    made = json.loads(run("keys", "create", "--project", "search", "--json"))
    assert (made["tenant"], made["project"]) == ("default", "search")
    (listed,) = json.loads(run("keys", "list", "--json"))
    assert (listed["id"], listed["project"]) == (made["id"], "search")
    # What is wrong leaves no project behind.
    with pytest.raises(HyclusterError):
        run("keys", "create", "--project", "other", "--scope", "all")
    assert [one["name"] for one in json.loads(run("projects", "list", "--json"))] == ["search"]
    # Nobody waits for a terminal while a key is abused.
    run("keys", "revoke", made["id"])
    assert KeyStore(open_database(Auth())).known_keys().callers == {}


def test_the_database_of_the_running_service(run: Run, tmp_path: Path) -> None:
    run("keys", "create", "--project", "here")
    url = f"sqlite:///{tmp_path / 'other.db'}"
    remember("127.0.0.1:6379")
    remember_service(["m"], url)
    run("keys", "create", "--project", "there")
    (made,) = KeyStore(open_database(Auth(database=url))).all_keys()
    assert made.project == "there"
    forget()
    (made,) = KeyStore(open_database(Auth())).all_keys()
    assert made.project == "here"


def test_a_url_with_a_password_is_written_nowhere() -> None:
    assert database_url(Auth(database="postgresql+psycopg://u:secret@h/n")) is None
    assert database_url(Auth(database="postgresql+psycopg://u@h/n")) == "postgresql+psycopg://u@h/n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("projects", "create", "a b"), "project: 'a b' is not allowed"),
        (("projects", "archive", "such", "--tenant", "no", "--yes"), "there is no project 'no/such'"),
        (("keys", "create", "--project", "acme/search"), "project: 'acme/search' is not allowed"),
        (("keys", "create", "--project", "p", "--expires", "soon"), "--expires: 'soon' is not allowed"),
        (("keys", "create", "--project", "p", "--scope", "all"), "scopes: 'all' is not allowed"),
        (("keys", "revoke", "key_x", "--yes"), "there is no key 'key_x'"),
    ],
)
def test_what_is_wrong_is_named(run: Run, command: tuple[str, ...], says: str) -> None:
    with pytest.raises(HyclusterError, match=re.escape(says)):
        run(*command)


def test_a_certificate_is_let_in_as_a_key_is(run: Run) -> None:
    name = "URI:spiffe://acme/ranker"
    search = ("keys", "create", "--project", "search", *ACME, "--certificate")
    said = run(*search, name, "--scope", "adapters", "--expires", "90d").split()
    (made,) = json.loads(run("keys", "list", "--json"))
    assert said == [made["id"], name]
    assert (made["certificate"], made["scopes"]) == (name, ["adapters"])
    assert "ranker" in run("keys", "list")
    assert list(KeyStore(open_database(Auth())).known_keys().callers) == [certificate_digest(name)]
    with pytest.raises(HyclusterError, match="stands for somebody"):
        run(*search, name)
    with pytest.raises(HyclusterError, match="is not allowed"):
        run(*search, "ranker")
    run("keys", "revoke", made["id"], "--yes")
    again = json.loads(run(*search, name, "--json"))
    assert again["certificate"] == name
    assert "key" not in again
