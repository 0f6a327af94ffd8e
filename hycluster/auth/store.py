"""Projects and their keys in the database, and the log of who changed what. Every method blocks.

Each change is one transaction with its line in the audit log, and counts one up in ``changes``.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Row, delete, insert, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from hycluster.auth import tables
from hycluster.auth.api_key import PREFIX, digest, new_key
from hycluster.auth.caller import SCOPES, Caller
from hycluster.auth.certificate import certificate_digest, check_certificate_name
from hycluster.auth.database import away
from hycluster.auth.limits import Limit, read_limits
from hycluster.auth.names import NAME
from hycluster.errors import InvalidInput, NotFound, shown

# Whose, of which kind, on which day or in which month.
Spent = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Project:
    """Times are in seconds since the epoch.

    Attributes:
        name: what belongs to it is marked with; for ever.
        title: how people call it; None: by its name.
    """

    id: str
    tenant: str
    name: str
    created_at: int
    archived_at: int | None
    title: str | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key; not the key. Times are in seconds since the epoch.

    Attributes:
        title: how people call it; None: by its name.
        account_id: the service account that has it; None: none.
        certificate: it is no key, but a name of a client's certificate.
    """

    id: str
    tenant: str
    project: str
    name: str
    models: tuple[str, ...] | None
    scopes: tuple[str, ...]
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    title: str | None = None
    account_id: str | None = None
    certificate: str | None = None

    @property
    def caller(self) -> Caller:
        models = None if self.models is None else frozenset(self.models)
        return Caller(self.tenant, self.project, self.name, models, frozenset(self.scopes), self.expires_at, self.id)


@dataclass(frozen=True, slots=True)
class Change:
    """A line of the audit log."""

    at: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """All that let somebody in, by their digests, as of a count of changes; the owners that are let in no more; and
    what limits there are."""

    changes: int
    callers: dict[bytes, Caller]
    archived: frozenset[str]
    limits: tuple[Limit, ...] = ()


class KeyStore:
    """Args: actor: who makes the changes, for the audit log."""

    def __init__(self, engine: Engine, actor: str = "") -> None:
        self._engine = engine
        self._actor = actor

    # -- what ingress processes ask ---------------------------------------------------------------------

    def count_changes(self) -> int:
        """Grows with each change.

        Raises:
            Unavailable: the database is away; so does everything below.
        """
        with self._reading() as connection:
            number: int = connection.execute(select(tables.changes.c.number)).scalar_one()
            return number

    def known_keys(self) -> KnownKeys:
        with self._reading() as connection:
            # First: what changes meanwhile is then read once more, and not missed.
            changes = connection.execute(select(tables.changes.c.number)).scalar_one()
            callers = {row.digest: api_key_of(row).caller for row in connection.execute(KEYS.where(LIVE))}
            rows = connection.execute(select(tables.projects).where(tables.projects.c.archived_at.is_not(None)))
            archived = frozenset(f"{row.tenant}/{row.name}" for row in rows)
            return KnownKeys(changes, callers, archived, read_limits(connection))

    # -- projects ---------------------------------------------------------------------------------------

    def create_project(self, tenant: str, name: str, title: str | None = None) -> Project:
        """
        Raises:
            InvalidInput: there is or was one of that name, or the name is none.
        """
        _check_name("tenant", tenant)
        _check_name("project", name)
        made = Project(new_id("proj_"), tenant, name, now_s(), None, title)
        values = {"id": made.id, "tenant": tenant, "name": name, "created_at": made.created_at, "title": title}
        told = {"tenant": tenant, "project": name} | ({} if title is None else {"title": title})
        try:
            with self._changing("project.created", made.id, told) as connection:
                connection.execute(insert(tables.projects).values(values))
        except IntegrityError:
            raise InvalidInput(f"project: there is or was a project {tenant}/{name}; names are given once") from None
        return made

    def projects(self) -> list[Project]:
        with self._reading() as connection:
            columns = tables.projects.c
            rows = connection.execute(select(tables.projects).order_by(columns.tenant, columns.name))
            return [Project(**row) for row in rows.mappings()]

    def project(self, tenant: str, name: str) -> Project:
        """
        Raises:
            NotFound: there is none of that name.
        """
        for project in self.projects():
            if (project.tenant, project.name) == (tenant, name):
                return project
        raise NotFound(f"project: there is no project {shown(f'{tenant}/{name}')}")

    def archive_project(self, project: Project) -> None:
        """Its keys let nobody in any more, for ever; what belongs to it stays. Of one that is archived nothing is
        written down again."""
        if project.archived_at is not None:
            return
        with self._changing("project.archived", project.id, {}) as connection:
            columns = tables.projects.c
            archived = update(tables.projects).where(columns.id == project.id, columns.archived_at.is_(None))
            connection.execute(archived.values(archived_at=now_s()))

    # -- keys -------------------------------------------------------------------------------------------

    @staticmethod
    def check_key(name: str, scopes: Iterable[str]) -> None:
        """
        Raises:
            InvalidInput: a name or a scope is none.
        """
        _check_name("name", name)
        for scope in scopes:
            if scope not in SCOPES:
                raise InvalidInput(f"scopes: {shown(scope)} is not allowed; there are {', '.join(SCOPES)}")

    def create_key(
        self,
        project: Project,
        name: str,
        *,
        models: Iterable[str] | None = None,
        scopes: Iterable[str] = (),
        expires_at: int | None = None,
        title: str | None = None,
        account_id: str | None = None,
    ) -> tuple[ApiKey, str]:
        """What is known of the new key, and the key itself, which nobody is told again.

        Raises:
            InvalidInput: a name or a scope is none, or the project is archived.
        """
        self.check_key(name, scopes)
        check_open(project)
        made = ApiKey(
            new_id("key_"),
            project.tenant,
            project.name,
            name,
            None if models is None else tuple(models),
            tuple(sorted(set(scopes))),
            now_s(),
            expires_at,
            None,
            title,
            account_id,
        )
        secret = new_key()
        with self._changing("key.created", made.id, audited(made)) as connection:
            connection.execute(insert(tables.keys).values(key_row(made, project, secret)))
        return made, secret

    def let_in(
        self,
        project: Project,
        name: str,
        certificate: str,
        *,
        models: Iterable[str] | None = None,
        scopes: Iterable[str] = (),
        expires_at: int | None = None,
    ) -> ApiKey:
        """Let in whoever shows a certificate with this name, as by a key.

        Args:
            certificate: ``URI:...``, ``DNS:...`` or ``subject:...``.

        Raises:
            InvalidInput: a name or a scope is none, the project is archived, or the certificate's name is somebody's.
        """
        self.check_key(name, scopes)
        check_certificate_name(certificate)
        check_open(project)
        made = ApiKey(
            new_id("key_"), project.tenant, project.name, name, None if models is None else tuple(models),
            tuple(sorted(set(scopes))), now_s(), expires_at, None, certificate=certificate,
        )  # fmt: skip
        columns = tables.keys.c
        # A name may be given again when it was taken from who had it; in the database it is one's alone.
        free = update(tables.keys).where(
            columns.digest == certificate_digest(certificate), columns.revoked_at.is_not(None)
        )
        try:
            with self._changing("key.created", made.id, audited(made)) as connection:
                connection.execute(free.values(digest=secrets.token_bytes(32)))
                connection.execute(insert(tables.keys).values(key_row(made, project, "")))
        except IntegrityError:
            raise InvalidInput(f"certificate: {shown(certificate)} stands for somebody; revoke that first") from None
        return made

    def all_keys(self) -> list[ApiKey]:
        """All, revoked ones too, the newest last."""
        with self._reading() as connection:
            rows = connection.execute(KEYS.order_by(tables.keys.c.created_at, tables.keys.c.id))
            return [api_key_of(row) for row in rows]

    def key(self, key_id: str) -> ApiKey:
        """
        Raises:
            NotFound: there is none of that id.
        """
        if key_id.startswith(PREFIX):
            # Which no message may have in it.
            raise NotFound("key: that is no id but a key itself; an id begins with 'key_'")
        with self._reading() as connection:
            row = connection.execute(KEYS.where(tables.keys.c.id == key_id)).one_or_none()
        if row is None:
            raise NotFound(f"key: there is no key {shown(key_id)}")
        return api_key_of(row)

    def key_itself(self, secret: str) -> ApiKey:
        """What is known of a key that somebody has, as one that was found where it should not be.

        Raises:
            NotFound: it is none, or not of this database.
        """
        with self._reading() as connection:
            row = connection.execute(KEYS.where(tables.keys.c.digest == digest(secret))).one_or_none()
        if row is None:
            raise NotFound("key: the one that was given is not known here; it may be cut, or another service's")
        return api_key_of(row)

    def revoke_key(self, key_id: str) -> None:
        """It lets nobody in any more, for ever. Of one that is revoked nothing is written down again.

        Raises:
            NotFound: there is none of that id.
        """
        if self.key(key_id).revoked_at is not None:
            return
        with self._changing("key.revoked", key_id, {}) as connection:
            columns = tables.keys.c
            revoked = update(tables.keys).where(columns.id == key_id, columns.revoked_at.is_(None))
            connection.execute(revoked.values(revoked_at=now_s()))

    def rotate_key(self, key_id: str, *, overlap_s: int = 0) -> tuple[ApiKey, str]:
        """Another key for the same; the old one lets in for so long yet."""
        old = self.key(key_id)
        if old.revoked_at is not None:
            raise InvalidInput(f"key: {key_id} is revoked; create another one")
        if old.expires_at is not None and old.expires_at <= now_s():
            # Its successor would end when it did.
            raise InvalidInput(f"key: {key_id} has expired; create another one")
        if old.certificate is not None:
            raise InvalidInput(f"key: {key_id} is a certificate's name; its authority gives the next certificate")
        project = self.project(old.tenant, old.project)
        new = self.create_key(
            project, old.name, models=old.models, scopes=old.scopes, expires_at=old.expires_at, title=old.title,
            account_id=old.account_id,
        )  # fmt: skip
        if not overlap_s:
            self.revoke_key(key_id)
            return new
        ends_at = min(now_s() + overlap_s, old.expires_at or now_s() + overlap_s)
        with self._changing("key.expires", key_id, {"expires_at": ends_at, "successor": new[0].id}) as connection:
            connection.execute(update(tables.keys).where(tables.keys.c.id == key_id).values(expires_at=ends_at))
        return new

    # -- limits -----------------------------------------------------------------------------------------

    def limits(self) -> list[Limit]:
        with self._reading() as connection:
            return list(read_limits(connection))

    def set_limit(self, limit: Limit) -> None:
        """Put it in the place of the one that its subject has, if it has one."""
        row = {**asdict(limit), "subject": limit.subject, "changed_at": now_s()}
        with self._changing("limit.set", limit.subject[:200], limit.values) as connection:
            connection.execute(delete(tables.limits).where(tables.limits.c.subject == limit.subject))
            connection.execute(insert(tables.limits).values(row))

    def remove_limit(self, subject: str) -> None:
        """
        Raises:
            NotFound: it has none.
        """
        if all(limit.subject != subject for limit in self.limits()):
            raise NotFound(f"limit: there is none of {shown(subject)}")
        with self._changing("limit.removed", subject[:200], {}) as connection:
            connection.execute(delete(tables.limits).where(tables.limits.c.subject == subject))

    def spend(self, spent: Mapping[Spent, int]) -> None:
        """Add to what has been used. No change that anybody has to hear of."""
        columns = tables.spent.c
        try:
            with self._engine.begin() as connection:
                for (subject, kind, period), amount in spent.items():
                    which = (columns.subject == subject) & (columns.kind == kind) & (columns.period == period)
                    more = update(tables.spent).where(which).values(amount=columns.amount + amount)
                    if connection.execute(more).rowcount == 0:
                        row = {"subject": subject, "kind": kind, "period": period, "amount": amount}
                        connection.execute(insert(tables.spent).values(row))
        except DBAPIError as error:
            raise away(error) from None

    def spent(self, periods: Iterable[str]) -> dict[Spent, int]:
        """What has been used within these days and months."""
        with self._reading() as connection:
            rows = connection.execute(select(tables.spent).where(tables.spent.c.period.in_(list(periods))))
            return {(row.subject, row.kind, row.period): row.amount for row in rows}

    def audit(self) -> list[Change]:
        """Every change, the oldest first."""
        with self._reading() as connection:
            rows = connection.execute(select(tables.audit).order_by(tables.audit.c.id))
            return [Change(row.at, row.actor, row.action, row.subject, row.detail) for row in rows]

    # -- transactions -----------------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except DBAPIError as error:
            raise away(error) from None

    @contextmanager
    def _changing(self, action: str, subject: str, detail: dict[str, Any]) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
                self._write_down(connection, action, subject, detail)
                connection.execute(update(tables.changes).values(number=tables.changes.c.number + 1))
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise away(error) from None

    def _write_down(self, connection: Connection, action: str, subject: str, detail: dict[str, Any]) -> None:
        line = {"at": now_s(), "actor": self._actor, "action": action, "subject": subject, "detail": detail}
        connection.execute(insert(tables.audit).values(line))


KEYS = select(tables.keys, tables.projects.c.tenant, tables.projects.c.name.label("project")).join(tables.projects)
LIVE = tables.keys.c.revoked_at.is_(None) & tables.projects.c.archived_at.is_(None)


def api_key_of(row: Row[Any]) -> ApiKey:
    """A row of :data:`KEYS`."""
    models = None if row.models is None else tuple(row.models)
    return ApiKey(
        row.id, row.tenant, row.project, row.name, models, tuple(row.scopes), row.created_at, row.expires_at,
        row.revoked_at, row.title, row.account_id, row.certificate,
    )  # fmt: skip


def key_row(key: ApiKey, project: Project, secret: str) -> dict[str, Any]:
    """What the table has of a key."""
    kept = ("id", "name", "models", "scopes", "created_at", "expires_at", "revoked_at", "title", "account_id",
            "certificate")  # fmt: skip
    digested = digest(secret) if key.certificate is None else certificate_digest(key.certificate)
    return {name: getattr(key, name) for name in kept} | {"project_id": project.id, "digest": digested}


def audited(key: ApiKey) -> dict[str, Any]:
    """What the audit log has of a new key."""
    told = ("tenant", "project", "name", "models", "scopes", "expires_at", "account_id")
    # Lines of keys stay as they were before certificates.
    whose = {} if key.certificate is None else {"certificate": key.certificate}
    return {name: getattr(key, name) for name in told} | whose


def check_open(project: Project) -> None:
    """
    Raises:
        InvalidInput: it is archived.
    """
    if project.archived_at is not None:
        raise InvalidInput(f"project: {project.tenant}/{project.name} is archived")


def _check_name(field: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"{field}: {shown(name)} is not allowed; must be 1 to 63 letters, digits, '.', '_' and '-', beginning with"
            " a letter or digit"
        )


def new_id(prefix: str) -> str:
    """An id that nothing has yet."""
    # By time, so that lists are in the order in which things were made.
    return f"{prefix}{time.time_ns() // 1_000_000:012x}{secrets.token_hex(6)}"


def now_s() -> int:
    """Seconds since the epoch."""
    return int(time.time())
