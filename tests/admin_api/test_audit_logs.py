"""Each change made over the admin API, and who made it, by the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.admin_api.conftest import Admin

pytestmark = pytest.mark.timeout(120)

ROOT = "key acme/ops/root"


async def made_changes(client: openai.AsyncOpenAI) -> tuple[str, str, str]:
    """One of each; ids of the project, the account and its key."""
    organization = client.admin.organization
    project = await organization.projects.create(name="search")
    await organization.projects.update(project.id, name="Search")
    account = await organization.projects.service_accounts.create(project.id, name="App")
    assert account.api_key is not None
    await organization.projects.service_accounts.update(account.id, project_id=project.id, name="The App")
    await organization.projects.api_keys.delete(account.api_key.id, project_id=project.id)
    await organization.projects.service_accounts.delete(account.id, project_id=project.id)
    await organization.admin_api_keys.create(name="Another")
    await organization.projects.archive(project.id)
    return project.id, account.id, account.api_key.id


async def test_every_change_is_written_down_with_its_maker(admin: Admin) -> None:
    async with admin.client() as client:
        project, account, key = await made_changes(client)
        logs = client.admin.organization.audit_logs
        events = [event async for event in logs.list()]
        # The newest first; the last two are the commands'.
        assert [event.type for event in events] == [
            "project.archived", "api_key.created", "service_account.deleted", "api_key.deleted",
            "service_account.updated", "service_account.created", "api_key.created", "project.updated",
            "project.created", "api_key.created", "project.created",
        ]  # fmt: skip
        assert [change.actor for change in admin.store.audit()] == ["cli root"] * 2 + [ROOT] * 9
        for event in events[:-2]:
            assert event.actor is not None
            assert event.actor.api_key is not None
            assert (event.actor.type, event.actor.api_key.id) == ("api_key", ROOT)
        last = events[-1].actor
        assert last is not None
        assert last.session is not None
        assert last.session.user is not None
        assert (last.type, last.session.user.id) == ("session", "cli root")
        created = next(event for event in events if event.type == "project.created")
        assert created.project_created is not None
        assert created.project_created.id == project
        assert created.project is not None
        # As it is called now.
        assert (created.project.id, created.project.name) == (project, "Search")
        for event, subject in ((events[3], key), (events[2], account)):
            assert event.project is not None
            assert event.project.id == project
            detail: Any = event.api_key_deleted or event.service_account_deleted
            assert detail.id == subject


async def test_filters(admin: Admin) -> None:
    async with admin.client() as client:
        project, account, key = await made_changes(client)
        logs = client.admin.organization.audit_logs

        async def kinds(**wanted: Any) -> list[str]:
            return [event.type async for event in logs.list(**wanted)]

        assert await kinds(event_types=["project.created", "project.archived"]) == [
            "project.archived", "project.created", "project.created",
        ]  # fmt: skip
        assert await kinds(event_types=["api_key.deleted"]) == ["api_key.deleted"]
        assert await kinds(event_types=["login.failed"]) == []
        assert len(await kinds(project_ids=[project])) == 8
        assert await kinds(resource_ids=[account, key]) == [
            "service_account.deleted", "api_key.deleted", "service_account.updated", "service_account.created",
            "api_key.created",
        ]  # fmt: skip
        assert await kinds(actor_ids=["cli root"]) == ["api_key.created", "project.created"]
        assert await kinds(actor_emails=["a@b"]) == []
        assert await kinds(project_ids=[project], event_types=["project.updated"]) == ["project.updated"]
        at = admin.store.audit()[0].at
        assert len(await kinds(effective_at={"gte": at, "lte": at + 60})) == 11
        assert await kinds(effective_at={"gt": at + 60}) == []
        assert await kinds(effective_at={"lt": at}) == []


async def test_pages_in_both_directions(admin: Admin) -> None:
    async with admin.client() as client:
        await made_changes(client)
        logs = client.admin.organization.audit_logs
        whole = [event.id async for event in logs.list(limit=100)]
        assert [event.id async for event in logs.list(limit=2)] == whole
        back = (await logs.list(limit=3, before=whole[5])).data
        assert [event.id for event in back] == whole[2:5]
        async with admin.http() as http:
            said = (await http.get("/audit_logs", params={"limit": 3, "before": whole[2]})).json()
            assert ([event["id"] for event in said["data"]], said["has_more"]) == (whole[:2], False)
            said = (await http.get("/audit_logs", params={"limit": 3, "before": whole[5]})).json()
            assert (said["first_id"], said["last_id"], said["has_more"]) == (whole[2], whole[4], True)


WRONG = (
    "event_types=project.created", "limit=0", "limit=101", "after=x", "after=audit_log-", "before=audit_log-1x",
    "effective_at[gt]=soon", "effective_at[gte]=-1", "project_ids[]=%00", "tenant_only=true", "who=me",
    "resource_ids[]=" + "a" * 201,
)  # fmt: skip


async def test_a_query_that_is_wrong_is_named(admin: Admin) -> None:
    async with admin.http() as http:
        for query in WRONG:
            answer = await http.get(f"/audit_logs?{query}")
            assert answer.status_code == 400, query
            assert answer.json()["error"]["message"].startswith(query.partition("=")[0])
