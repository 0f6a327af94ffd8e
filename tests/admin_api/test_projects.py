"""Projects, service accounts and keys, by the official client, over a socket."""

from __future__ import annotations

import time

import openai
import pytest

from hycluster.auth.caller import Caller
from tests.admin_api.conftest import Admin

pytestmark = pytest.mark.timeout(120)


async def test_a_project_from_its_making_to_its_end(admin: Admin) -> None:
    async with admin.client() as client:
        projects = client.admin.organization.projects
        made = await projects.create(name="search")
        assert (made.object, made.name, made.status, made.archived_at) == (
            "organization.project",
            "search",
            "active",
            None,
        )
        assert abs(made.created_at - time.time()) < 60
        assert await projects.retrieve(made.id) == made
        # Of the admin key's tenant, and as the commands know it.
        assert admin.store.project("acme", "search").id == made.id
        assert (await projects.update(made.id, name="Search & Ads")).name == "Search & Ads"
        assert admin.store.project("acme", "search").title == "Search & Ads"
        listed = [project.name async for project in projects.list()]
        assert listed == ["ops", "Search & Ads"]
        _, key = admin.store.create_key(admin.store.project("acme", "search"), "laptop")
        assert admin.lets_in(key)
        ended = await projects.archive(made.id)
        assert ended.status == "archived"
        assert ended.archived_at
        assert not admin.lets_in(key)
        assert (await projects.archive(made.id)).archived_at == ended.archived_at
        assert [project.name async for project in projects.list()] == ["ops"]
        assert len([project async for project in projects.list(include_archived=True)]) == 2
        for refused in (
            projects.update(made.id, name="again"),
            projects.service_accounts.create(made.id, name="late"),
        ):
            with pytest.raises(openai.BadRequestError, match="is archived"):
                await refused
        assert (await projects.service_accounts.list(made.id)).data == []
        assert (await projects.api_keys.list(made.id)).data == []


@pytest.mark.parametrize(
    ("title", "name"),
    [("Project ABC", "Project-ABC"), ("  a/b  ", "a-b"), ("搜索", "project"), ("-._", "project"), ("v1.2_x", "v1.2_x")],
    ids=ascii,
)
async def test_a_title_is_any_text(admin: Admin, title: str, name: str) -> None:
    async with admin.client() as client:
        projects = client.admin.organization.projects
        made = await projects.create(name=title)
        assert made.name == title.strip()
        assert admin.store.project("acme", name).id == made.id
        if name == title:
            with pytest.raises(openai.BadRequestError, match=r"there is or was a project acme/v1\.2_x"):
                await projects.create(name=title)
        else:
            # Another of the same title is marked otherwise.
            assert (await projects.create(name=title)).id != made.id


async def test_a_service_account_and_its_keys(admin: Admin) -> None:
    async with admin.client() as client:
        project = await client.admin.organization.projects.create(name="search")
        accounts, keys = (
            client.admin.organization.projects.service_accounts,
            client.admin.organization.projects.api_keys,
        )
        made = await accounts.create(project.id, name="Production App", expires_in_seconds=3600)
        assert (made.object, made.role, made.name) == (
            "organization.project.service_account",
            "member",
            "Production App",
        )
        assert made.api_key is not None
        first = made.api_key
        assert first.object == "organization.project.service_account.api_key"
        assert first.expires_at is not None
        assert abs(first.expires_at - time.time() - 3600) < 60
        admin.keyring.look()
        assert admin.keyring.caller(first.value) == Caller(
            "acme", "search", "Production-App", None, frozenset({"batch"}), first.expires_at, first.id
        )
        narrow = await accounts.api_keys.create(
            made.id, project_id=project.id, name="one model", scopes=["model:org/tiny"]
        )
        admin.keyring.look()
        caller = admin.keyring.caller(narrow.value)
        assert (caller.models, caller.scopes) == (frozenset({"org/tiny"}), frozenset())
        wide = await accounts.api_keys.create(made.id, project_id=project.id, scopes=["batch", "model:*"])
        admin.keyring.look()
        assert admin.keyring.caller(wide.value).models is None
        by_command, _ = admin.store.create_key(admin.store.project("acme", "search"), "laptop")
        listed = [key async for key in keys.list(project.id)]
        assert [key.id for key in listed] == [first.id, narrow.id, wide.id, by_command.id]
        assert await keys.retrieve(narrow.id, project_id=project.id) == listed[1]
        owner = listed[1].owner.service_account
        assert owner is not None
        assert (owner.id, owner.name, listed[1].name) == (made.id, "Production App", "one model")
        assert (listed[3].owner.service_account, listed[3].name) == (None, "laptop")
        text = "".join(key.model_dump_json() for key in listed)
        assert not any(secret in text for secret in (first.value, narrow.value, wide.value))

        gone = await keys.delete(narrow.id, project_id=project.id)
        assert (gone.id, gone.deleted, gone.object) == (narrow.id, True, "organization.project.api_key.deleted")
        assert not admin.lets_in(narrow.value)
        with pytest.raises(openai.NotFoundError):
            await keys.delete(narrow.id, project_id=project.id)

        only = await accounts.create(project.id, name="no key", create_service_account_only=True)
        assert only.api_key is None
        assert (await accounts.update(only.id, project_id=project.id, name="still none")).name == "still none"
        assert [one.name async for one in accounts.list(project.id)] == ["Production App", "still none"]
        ended = await accounts.delete(made.id, project_id=project.id)
        assert (ended.object, ended.deleted) == ("organization.project.service_account.deleted", True)
        assert not any(admin.lets_in(secret) for secret in (first.value, wide.value))
        with pytest.raises(openai.NotFoundError):
            await accounts.retrieve(made.id, project_id=project.id)
        assert [key.id async for key in keys.list(project.id)] == [by_command.id]


async def test_admin_keys(admin: Admin) -> None:
    async with admin.client() as client:
        keys = client.admin.organization.admin_api_keys
        made = await keys.create(name="New Admin Key", expires_in_seconds=600)
        assert (made.object, made.name) == ("organization.admin_api_key", "New Admin Key")
        assert (await keys.retrieve(made.id)).model_dump() == made.model_dump(exclude={"value"})
        admin.keyring.look()
        caller = admin.keyring.caller(made.value)
        # It administrates, and asks no model.
        assert (caller.owner, caller.models, caller.scopes) == ("acme/ops", frozenset(), frozenset({"admin"}))
        assert [key.name async for key in keys.list(order="desc")] == ["New Admin Key", "root"]
        assert [key.name async for key in keys.list(limit=1)] == ["root", "New Admin Key"]
        async with admin.client(made.value) as other:
            assert [project.name async for project in other.admin.organization.projects.list()] == ["ops"]
        assert (await keys.delete(made.id)).object == "organization.admin_api_key.deleted"
        assert not admin.lets_in(made.value)
        assert [key.name async for key in keys.list()] == ["root"]
        plain, _ = admin.store.create_key(admin.store.project("acme", "ops"), "plain", scopes=["batch"])
        with pytest.raises(openai.NotFoundError):
            await keys.delete(plain.id)
