"""Projects and keys, in SQLite and, where there is one, in PostgreSQL."""

from __future__ import annotations

import json
import time

import pytest

from hycluster.auth.api_key import digest
from hycluster.auth.caller import Caller
from hycluster.auth.store import KeyStore, Project
from hycluster.errors import InvalidInput, NotFound

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def project(store: KeyStore) -> Project:
    return store.create_project("acme", "search")


def test_a_key_is_known_by_its_digest_and_shown_once(store: KeyStore, project: Project) -> None:
    made, secret = store.create_key(project, "laptop", models=["m"], scopes=["batch"], expires_at=2_000_000_000)
    known = store.known_keys()
    caller = Caller("acme", "search", "laptop", frozenset({"m"}), frozenset({"batch"}), 2_000_000_000, made.id)
    assert known.callers == {digest(secret): caller}
    assert store.all_keys() == [made]
    assert store.key(made.id) == made
    told = json.dumps([repr(store.all_keys()), repr(store.audit()), repr(made)])
    assert secret not in told
    assert digest(secret).hex() not in told


def test_each_change_is_counted_and_written_down(store: KeyStore, project: Project) -> None:
    counts = [store.count_changes()]
    made, _ = store.create_key(project, "laptop")
    counts.append(store.count_changes())
    store.revoke_key(made.id)
    counts.append(store.count_changes())
    store.archive_project(project)
    counts.append(store.count_changes())
    assert counts == sorted(set(counts))
    assert [(change.actor, change.action, change.subject) for change in store.audit()] == [
        ("test", "project.created", project.id),
        ("test", "key.created", made.id),
        ("test", "key.revoked", made.id),
        ("test", "project.archived", project.id),
    ]


def test_what_is_revoked_or_archived_is_known_no_more(store: KeyStore, project: Project) -> None:
    made, _ = store.create_key(project, "one")
    store.create_key(project, "two")
    store.revoke_key(made.id)
    assert [caller.key for caller in store.known_keys().callers.values()] == ["two"]
    store.archive_project(project)
    known = store.known_keys()
    assert (known.callers, known.archived) == ({}, frozenset({"acme/search"}))
    with pytest.raises(InvalidInput, match="acme/search is archived"):
        store.create_key(store.project("acme", "search"), "three")


def test_rotation(store: KeyStore, project: Project) -> None:
    old, _ = store.create_key(project, "one", models=["m"], scopes=["admin"])
    new, secret = store.rotate_key(old.id)
    assert (new.name, new.models, new.scopes) == ("one", ("m",), ("admin",))
    assert list(store.known_keys().callers) == [digest(secret)]
    newest, _ = store.rotate_key(new.id, overlap_s=3600)
    assert len(store.known_keys().callers) == 2
    ends_at = store.key(new.id).expires_at
    assert ends_at is not None
    assert 3000 < ends_at - time.time() <= 3600
    assert newest.expires_at is None
    with pytest.raises(InvalidInput, match="is revoked"):
        store.rotate_key(old.id)


def test_names_are_given_once(store: KeyStore, project: Project) -> None:
    before = store.count_changes()
    store.create_project("other", "search")
    for archived in (False, True):
        if archived:
            store.archive_project(project)
        with pytest.raises(InvalidInput, match="there is or was a project acme/search"):
            store.create_project("acme", "search")
    # What failed is not written down.
    assert store.count_changes() == before + 2


@pytest.mark.parametrize("name", ["", "a/b", "-a", "ä", "a" * 64, "a\n", "a b"], ids=ascii)
def test_odd_names(store: KeyStore, project: Project, name: str) -> None:
    for make in (
        lambda: store.create_project(name, "p"),
        lambda: store.create_project("t", name),
        lambda: store.create_key(project, name),
    ):
        with pytest.raises(InvalidInput, match="must be 1 to 63 letters"):
            make()


def test_what_is_not_there(store: KeyStore, project: Project) -> None:
    for ask in (lambda: store.key("key_x"), lambda: store.revoke_key("key_x"), lambda: store.project("acme", "x")):
        with pytest.raises(NotFound):
            ask()
    with pytest.raises(InvalidInput, match="scopes: 'root' is not allowed; there are batch, admin, priority"):
        store.create_key(project, "one", scopes=["root"])
    assert [change.action for change in store.audit()] == ["project.created"]
