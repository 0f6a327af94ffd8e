"""What the admin API asks of the database: one page of a list at a time, what things are called, and service accounts.

All by ids. Whoever manages one tenant only is told of others what he is told of ids that nothing has. Every method
blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Engine, Select, String, cast, func, insert, select, true, update

from hycluster.auth import tables
from hycluster.auth.api_key import new_key
from hycluster.auth.caller import Scope
from hycluster.auth.names import NAME
from hycluster.auth.store import (
    KEYS,
    LIVE,
    ApiKey,
    Change,
    KeyStore,
    Project,
    api_key_of,
    audited,
    check_open,
    key_row,
    new_id,
    now_s,
)
from hycluster.errors import InvalidInput, NotFound, shown

Order = Literal["asc", "desc"]
MAX_NAME = 63
ID = re.compile(r"[A-Za-z0-9_-]{1,40}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """What keys of a project may be of. Times are in seconds since the epoch."""

    id: str
    project_id: str
    title: str
    created_at: int
    deleted_at: int | None


@dataclass(frozen=True, slots=True)
class LoggedChange:
    """A line of the audit log with its number, and the project that it is about if it is about one."""

    number: int
    change: Change
    project: Project | None


@dataclass(frozen=True, slots=True)
class ChangesWanted:
    """Which lines of the audit log; empty is any. ``since`` and ``until`` are in seconds since the epoch, both
    included."""

    actions: Sequence[str] = ()
    actors: Sequence[str] = ()
    subjects: Sequence[str] = ()
    projects: Sequence[str] = ()
    since: int | None = None
    until: int | None = None


class AdminStore(KeyStore):
    """
    Args:
        actor: who makes the changes, for the audit log.
        tenant: whose projects are managed; None: everybody's.
    """

    def __init__(self, engine: Engine, actor: str, tenant: str | None = None) -> None:
        super().__init__(engine, actor)
        self._managed: ColumnElement[bool] = true() if tenant is None else tables.projects.c.tenant == tenant

    # -- projects ---------------------------------------------------------------------------------------

    def page_of_projects(self, after: str | None, limit: int, *, archived: bool) -> list[Project]:
        """The oldest first, those behind ``after``."""
        columns = tables.projects.c
        found = _page(select(tables.projects).where(self._managed), columns.id, after, limit)
        with self._reading() as connection:
            rows = connection.execute(found if archived else found.where(columns.archived_at.is_(None)))
            return [Project(**row) for row in rows.mappings()]

    def managed_projects(self) -> dict[tuple[str, str], Project]:
        """By tenant and name, archived ones too."""
        with self._reading() as connection:
            rows = connection.execute(select(tables.projects).where(self._managed)).mappings()
            return {(row["tenant"], row["name"]): Project(**row) for row in rows}

    def project_by_id(self, project_id: str) -> Project:
        """
        Raises:
            NotFound: there is none of that id; so do all below that are given one.
        """
        with self._reading() as connection:
            found = select(tables.projects).where(tables.projects.c.id == _id(project_id), self._managed)
            row = connection.execute(found).mappings().one_or_none()
        if row is None:
            raise NotFound(f"project_id: there is no project {shown(project_id)}")
        return Project(**row)

    def add_project(self, tenant: str, title: str) -> Project:
        """A project that people call so. What is marked with a project needs a name: it is the title if that can be
        one, or as near to it as is free.

        Raises:
            InvalidInput: there is or was one of that name.
        """
        if NAME.fullmatch(title):
            return self.create_project(tenant, title)
        try:
            return self.create_project(tenant, as_name(title, "project"), title)
        except InvalidInput:
            return self.create_project(tenant, new_id(f"{as_name(title, 'project')[:30]}-"), title)

    def project_or_new(self, tenant: str, name: str) -> Project:
        """That which a caller is of: with tokens it needs not be in the database."""
        found = next((one for one in self.projects() if (one.tenant, one.name) == (tenant, name)), None)
        return found or self.create_project(tenant, name)

    def rename_project(self, project_id: str, title: str) -> Project:
        """What people call it; what is marked with its name stays."""
        project = self.project_by_id(project_id)
        check_open(project)
        with self._changing("project.updated", project_id, {"title": title}) as connection:
            connection.execute(update(tables.projects).where(tables.projects.c.id == project_id).values(title=title))
        return self.project_by_id(project_id)

    def archive_by_id(self, project_id: str) -> Project:
        project = self.project_by_id(project_id)
        if project.archived_at is None:
            self.archive_project(project)
        return self.project_by_id(project_id)

    # -- service accounts -------------------------------------------------------------------------------

    def page_of_accounts(self, project_id: str, after: str | None, limit: int) -> list[ServiceAccount]:
        """The oldest first, those behind ``after``; an archived project has none."""
        if self.project_by_id(project_id).archived_at is not None:
            return []
        columns = tables.service_accounts.c
        found = select(tables.service_accounts).where(columns.project_id == project_id, columns.deleted_at.is_(None))
        with self._reading() as connection:
            rows = connection.execute(_page(found, columns.id, after, limit))
            return [ServiceAccount(**row) for row in rows.mappings()]

    def account(self, project_id: str, account_id: str) -> ServiceAccount:
        """
        Raises:
            NotFound: the project has none of that id.
        """
        project = self.project_by_id(project_id)
        columns = tables.service_accounts.c
        found = select(tables.service_accounts).where(
            columns.id == _id(account_id), columns.project_id == project_id, columns.deleted_at.is_(None)
        )
        with self._reading() as connection:
            row = connection.execute(found).mappings().one_or_none()
        if row is None or project.archived_at is not None:
            raise NotFound(f"service_account_id: there is no service account {shown(account_id)} in this project")
        return ServiceAccount(**row)

    def accounts(self, account_ids: Iterable[str]) -> dict[str, ServiceAccount]:
        """By id, deleted ones too."""
        wanted = select(tables.service_accounts).where(tables.service_accounts.c.id.in_(set(account_ids)))
        with self._reading() as connection:
            return {row["id"]: ServiceAccount(**row) for row in connection.execute(wanted).mappings()}

    def add_account(
        self, project_id: str, title: str, *, with_key: bool, scopes: Sequence[Scope] = (),
        expires_at: int | None = None,
    ) -> tuple[ServiceAccount, tuple[ApiKey, str] | None]:  # fmt: skip
        """A new one, and its first key, which nobody is told again: both, or neither."""
        project = self.project_by_id(project_id)
        check_open(project)
        made = ServiceAccount(new_id("svc_"), project_id, title, now_s(), None)
        key = ApiKey(
            new_id("key_"), project.tenant, project.name, as_name(title, "key"), None, tuple(scopes), made.created_at,
            expires_at, None, None, made.id,
        )  # fmt: skip
        secret = new_key()
        with self._changing("service_account.created", made.id, {"title": title}) as connection:
            columns = {name: getattr(made, name) for name in ("id", "project_id", "title", "created_at")}
            connection.execute(insert(tables.service_accounts).values(columns))
            if with_key:
                connection.execute(insert(tables.keys).values(key_row(key, project, secret)))
                self._write_down(connection, "key.created", key.id, audited(key))
        return made, (key, secret) if with_key else None

    def add_key(
        self, account: ServiceAccount, title: str | None, *, models: Iterable[str] | None, scopes: Iterable[str],
        expires_at: int | None,
    ) -> tuple[ApiKey, str]:  # fmt: skip
        """Another key of a service account, as :meth:`create_key` has it."""
        return self.create_key(
            self.project_by_id(account.project_id), as_name(title or account.title, "key"), models=models,
            scopes=scopes, expires_at=expires_at, title=title, account_id=account.id,
        )  # fmt: skip

    def rename_account(self, project_id: str, account_id: str, title: str) -> ServiceAccount:
        self.account(project_id, account_id)
        with self._changing("service_account.updated", account_id, {"title": title}) as connection:
            columns = tables.service_accounts.c
            connection.execute(update(tables.service_accounts).where(columns.id == account_id).values(title=title))
        return self.account(project_id, account_id)

    def delete_account(self, project_id: str, account_id: str) -> None:
        """It, and its keys let nobody in any more, for ever."""
        self.account(project_id, account_id)
        keys, accounts = tables.keys.c, tables.service_accounts.c
        with self._changing("service_account.deleted", account_id, {}) as connection:
            of_it = keys.account_id == account_id, keys.revoked_at.is_(None)
            for key_id in connection.execute(select(keys.id).where(*of_it)).scalars().all():
                self._write_down(connection, "key.revoked", key_id, {"account_id": account_id})
            connection.execute(update(tables.keys).where(*of_it).values(revoked_at=now_s()))
            ended = update(tables.service_accounts).where(accounts.id == account_id)
            connection.execute(ended.values(deleted_at=now_s()))

    # -- keys -------------------------------------------------------------------------------------------

    def page_of_keys(self, project_id: str | None, after: str | None, limit: int, order: Order = "asc") -> list[ApiKey]:
        """A project's keys that are not revoked, those behind ``after``; None: keys with the scope ``admin``."""
        if project_id is not None:
            self.project_by_id(project_id)
        found = _page(self._keys_of(project_id), tables.keys.c.id, after, limit, order)
        with self._reading() as connection:
            return [api_key_of(row) for row in connection.execute(found)]

    def key_of(self, project_id: str | None, key_id: str) -> ApiKey:
        """
        Raises:
            NotFound: there is none of that id among those that :meth:`page_of_keys` lists.
        """
        if project_id is not None:
            self.project_by_id(project_id)
        with self._reading() as connection:
            row = connection.execute(self._keys_of(project_id).where(tables.keys.c.id == _id(key_id))).one_or_none()
        if row is None:
            raise NotFound(f"key_id: there is no key {shown(key_id)} here")
        return api_key_of(row)

    def revoke_key_of(self, project_id: str | None, key_id: str) -> None:
        self.key_of(project_id, key_id)
        self.revoke_key(key_id)

    def _keys_of(self, project_id: str | None) -> Select[Any]:
        if project_id is not None:
            return KEYS.where(LIVE, self._managed, tables.keys.c.project_id == project_id)
        return KEYS.where(LIVE, self._managed, cast(tables.keys.c.scopes, String).like('%"admin"%'))

    # -- the audit log ----------------------------------------------------------------------------------

    def page_of_changes(
        self, wanted: ChangesWanted, *, after: int | None, before: int | None, limit: int
    ) -> list[LoggedChange]:
        """The newest first: those behind the line ``after``, or the last ones ahead of ``before``."""
        log, projects = tables.audit.c, tables.projects
        about = func.coalesce(tables.keys.c.project_id, tables.service_accounts.c.project_id, log.subject)
        found = (
            select(tables.audit, *(column.label(f"project_{column.name}") for column in projects.c))
            .select_from(tables.audit)
            .outerjoin(tables.keys, tables.keys.c.id == log.subject)
            .outerjoin(tables.service_accounts, tables.service_accounts.c.id == log.subject)
            .outerjoin(projects, projects.c.id == about)
            .where(self._managed)
        )
        for column, values in (
            (log.action, wanted.actions),
            (log.actor, wanted.actors),
            (log.subject, wanted.subjects),
            (projects.c.id, wanted.projects),
        ):
            if values:
                found = found.where(column.in_(values))
        if wanted.since is not None:
            found = found.where(log.at >= wanted.since)
        if wanted.until is not None:
            found = found.where(log.at <= wanted.until)
        if after is not None:
            found = found.where(log.id < after)
        if before is not None:
            found = found.where(log.id > before)
        forward = before is not None and after is None
        found = found.order_by(log.id.asc() if forward else log.id.desc()).limit(limit)
        with self._reading() as connection:
            lines = [_logged(row) for row in connection.execute(found).mappings()]
        return lines[::-1] if forward else lines


def _id(asked: str) -> str:
    # PostgreSQL takes not every text.
    return asked if ID.fullmatch(asked) else ""


def as_name(title: str, otherwise: str) -> str:
    """The name nearest to what people call a thing."""
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", title).strip("._-")[:MAX_NAME]
    return found or otherwise


def _page(
    found: Select[Any], column: ColumnElement[Any], after: str | None, limit: int, order: Order = "asc"
) -> Select[Any]:
    if after is not None:
        found = found.where(column > after if order == "asc" else column < after)
    return found.order_by(column.asc() if order == "asc" else column.desc()).limit(limit)


def _logged(row: Any) -> LoggedChange:
    project = {name.removeprefix("project_"): value for name, value in row.items() if name.startswith("project_")}
    change = Change(row["at"], row["actor"], row["action"], row["subject"], row["detail"])
    return LoggedChange(row["id"], change, Project(**project) if project["id"] is not None else None)
