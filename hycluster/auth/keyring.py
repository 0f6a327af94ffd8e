"""The keys that one ingress process knows, and the thread that looks for changes.

A request is answered by what is in memory; no request waits for the database, or makes it work.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sqlalchemy import Engine

from hycluster.auth.api_key import digest, is_whole
from hycluster.auth.caller import Caller
from hycluster.auth.certificate import PeerCertificate, certificate_digest
from hycluster.auth.database import bring_up_to_date
from hycluster.auth.limits import Limit
from hycluster.auth.store import KeyStore, KnownKeys
from hycluster.errors import HyclusterError, Unauthenticated, Unavailable
from hycluster.settings.auth import Auth

logger = logging.getLogger(__name__)

# Unheard of for so long, the database counts as away: what it would say of a key that is not known can't be told.
AWAY_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class _Seen:
    keys: KnownKeys
    at_s: float
    by_id: dict[str, Caller]


class Keyring:
    """Use it as a context manager: it looks once before it is entered, then again and again.

    Attributes:
        store: of the database that it looks into.
    """

    def __init__(self, engine: Engine, settings: Auth, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self.store = KeyStore(engine)
        self._settings = settings
        self._clock = clock
        # Replaced as one, so that readers need no lock.
        self._seen = _Seen(KnownKeys(0, {}, frozenset()), float("-inf"), {})
        self._migrated = self._said_away = False
        self._looking = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keyring", daemon=True)

    def __enter__(self) -> Self:
        try:
            self.look()
            self._thread.start()
        except BaseException:
            self._engine.dispose()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        self._engine.dispose()

    def caller(self, secret: str) -> Caller:
        """Who bears this key.

        Raises:
            Unauthenticated: nobody, or not any more.
            Unavailable: that can't be told now.
        """
        seen = self._seen
        # Whatever it is, it is hashed as a whole and looked up by that: time tells nothing of any key.
        caller = seen.keys.callers.get(digest(secret))
        if caller is None and not is_whole(secret):
            raise Unauthenticated("API key: is not correct: not a whole key of this service")
        return self._still(caller, seen, "API key")

    def shows(self, certificate: PeerCertificate) -> Caller:
        """Who shows this certificate: the first of its names that stands for somebody says it.

        Raises:
            Unauthenticated: nobody, or not any more.
            Unavailable: that can't be told now.
        """
        seen = self._seen
        known = (seen.keys.callers.get(certificate_digest(name)) for name in certificate.names)
        return self._still(next(filter(None, known), None), seen, "certificate")

    def _still(self, caller: Caller | None, seen: _Seen, what: str) -> Caller:
        if self._clock() - seen.at_s > (AWAY_AFTER_S if caller is None else max(AWAY_AFTER_S, self._settings.grace_s)):
            raise Unavailable(f"{what}: can't be checked now, the database of keys is away", retry_after_s=1)
        if caller is None:
            raise Unauthenticated(f"{what}: is not correct: not known here, or revoked")
        if caller.expires_at is not None and caller.expires_at <= time.time():
            raise Unauthenticated(f"{what}: has expired")
        return caller

    def is_archived(self, caller: Caller) -> bool:
        """
        Raises:
            Unavailable: that can't be told: the database has been away for too long, or since the beginning.
        """
        seen = self._seen
        if self._clock() - seen.at_s > max(AWAY_AFTER_S, self._settings.grace_s):
            raise Unavailable("token: can't be checked now, the database of projects is away", retry_after_s=1)
        return caller.owner in seen.keys.archived

    @property
    def limits(self) -> tuple[Limit, ...]:
        """Those that are known; the same object for as long as nothing has changed."""
        return self._seen.keys.limits

    def key_name(self, key_id: str) -> str:
        """Of a key that lets in; else empty."""
        caller = self._seen.by_id.get(key_id)
        return caller.key if caller else ""

    def has_ended(self, caller: Caller) -> bool:
        """Whether one that was let in would not be any more. While the database is away, nobody that it knew of."""
        seen = self._seen
        if not caller.key_id:
            return caller.owner in seen.keys.archived
        now = seen.by_id.get(caller.key_id)
        return now is None or (now.expires_at is not None and now.expires_at <= time.time())

    def look(self) -> None:
        """Take in what has changed. Never raises: what is known goes on for a while. May be called by any thread."""
        # Of two at once the slower one would take back what the other has seen.
        with self._looking:
            self._look()

    def _look(self) -> None:
        began_s, seen = self._clock(), self._seen
        try:
            if not self._migrated:
                # Where no `hycluster serve` has done it.
                bring_up_to_date(self._engine)
                self._migrated = True
            changed = self.store.count_changes() != seen.keys.changes
            if changed:
                keys = self.store.known_keys()
                self._seen = _Seen(keys, began_s, {caller.key_id: caller for caller in keys.callers.values()})
            else:
                self._seen = _Seen(seen.keys, began_s, seen.by_id)
        except HyclusterError as error:
            if not self._said_away:
                logger.warning("%s; known keys go on for %g s", error.message, self._settings.grace_s)
            self._said_away = True
        else:
            if self._said_away:
                logger.warning("auth.database: is back")
            self._said_away = False

    def _run(self) -> None:
        while not self._closing.wait(self._settings.poll_s):
            try:
                self.look()
            except Exception:
                # Or no revoked key would ever be dead.
                logger.exception("auth.database: can't be looked at; trying again")
