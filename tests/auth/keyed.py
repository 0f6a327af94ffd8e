"""A database with keys, and what stands at a door with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hycluster.auth.database import bring_up_to_date, open_database
from hycluster.auth.guard import Guard
from hycluster.auth.keyring import Keyring
from hycluster.auth.store import ApiKey, KeyStore
from hycluster.settings.auth import Auth


class Keyed:
    """Attributes: store: what changes keys. file: the database."""

    def __init__(self, store: KeyStore, keyring: Keyring, file: Path) -> None:
        self.store = store
        self.guard = Guard(keyring)
        self.file = file
        self._keyring = keyring
        self._project = store.create_project("acme", "search")
        self._other = store.create_project("acme", "other")

    def key(self, *scopes: str, models: list[str] | None = None, other: bool = False, lasts_s: int = 3600) -> str:
        """A key that is known already."""
        project = self._other if other else self._project
        ends_at = int(time.time()) + lasts_s
        _, secret = self.store.create_key(project, "test", models=models, scopes=scopes, expires_at=ends_at)
        self._keyring.look()
        return secret

    def let_in(self, name: str, certificate: str, *, other: bool = False) -> ApiKey:
        """A client certificate's name that is known already."""
        made = self.store.let_in(self._other if other else self._project, name, certificate)
        self._keyring.look()
        return made

    def revoke(self, key_id: str) -> None:
        """Known already, too."""
        self.store.revoke_key(key_id)
        self._keyring.look()

    def archive(self) -> None:
        """The first project; known already, too."""
        self.store.archive_project(self._project)
        self._keyring.look()

    def revoke_all(self) -> None:
        """Known already, too."""
        for key in self.store.all_keys():
            self.store.revoke_key(key.id)
        self._keyring.look()


@contextmanager
def keyed(folder: Path, poll_s: float = 0.05) -> Iterator[Keyed]:
    settings = Auth(enabled=True, database=f"sqlite:///{folder / 'keys.db'}", poll_s=poll_s)
    engine = open_database(settings)
    bring_up_to_date(engine)
    with Keyring(engine, settings) as keyring:
        yield Keyed(KeyStore(engine, "test"), keyring, folder / "keys.db")
