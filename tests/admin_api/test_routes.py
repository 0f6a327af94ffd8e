"""Who is let in, what is refused and how, and lists page by page."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse

from hycluster.admin_api.app import open_administration, with_admin
from hycluster.auth.admin_store import AdminStore
from hycluster.auth.caller import SCOPES
from hycluster.settings.auth import Auth, Oidc
from hycluster.settings.ingress import Http
from tests.admin_api.conftest import Admin
from tests.postgres import Postgres

pytestmark = pytest.mark.timeout(120)

PATHS = (
    ("GET", "/projects"), ("POST", "/projects"), ("GET", "/projects/x"), ("POST", "/projects/x"),
    ("POST", "/projects/x/archive"), ("GET", "/projects/x/service_accounts"), ("POST", "/projects/x/service_accounts"),
    ("GET", "/projects/x/service_accounts/y"), ("POST", "/projects/x/service_accounts/y"),
    ("DELETE", "/projects/x/service_accounts/y"), ("POST", "/projects/x/service_accounts/y/api_keys"),
    ("GET", "/projects/x/api_keys"), ("GET", "/projects/x/api_keys/y"), ("DELETE", "/projects/x/api_keys/y"),
    ("GET", "/admin_api_keys"), ("POST", "/admin_api_keys"), ("GET", "/admin_api_keys/y"),
    ("DELETE", "/admin_api_keys/y"), ("GET", "/audit_logs"),
    ("GET", "/usage/completions"), ("GET", "/costs"), ("GET", "/nothing"), ("GET", ""),
)  # fmt: skip


async def test_nobody_but_administrators_comes_in(admin: Admin) -> None:
    project = admin.store.project("acme", "ops")
    others = [scope for scope in SCOPES if scope != "admin"]
    _, plain = admin.store.create_key(project, "plain", scopes=others)
    _, spent = admin.store.create_key(project, "spent", scopes=["admin"], expires_at=1)
    admin.keyring.look()
    before = admin.store.count_changes()
    async with httpx.AsyncClient(base_url=f"{admin.url}/v1/organization") as nobody:
        for method, path in PATHS:
            assert (await nobody.request(method, path)).status_code == 401
    for key, status in ((plain, 403), (spent, 401)):
        async with admin.http(key) as http:
            for method, path in PATHS:
                assert (await http.request(method, path, json={"name": "x"})).status_code == status, (method, path)
    async with admin.client(plain) as client:
        with pytest.raises(openai.PermissionDeniedError, match="needs the scope 'admin'"):
            await client.admin.organization.projects.create(name="x")
    assert admin.store.count_changes() == before


@pytest.mark.parametrize(
    "auth",
    [
        Auth(),
        Auth(
            enabled=True,
            keys=False,
            oidc=(Oidc(issuer="https://id", audience="us", jwks_url="https://id/keys"),),
        ),
    ],
    ids=["nobody is asked", "tokens only"],
)
async def test_without_keys_there_is_none(auth: Auth) -> None:
    async with open_administration(auth) as administration:
        app = with_admin(administration, Http(), JSONResponse({"app": "other"}))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as http:
            for path in ("/v1/organization", "/v1/organization/projects"):
                answer = await http.get(path)
                assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")
                assert "only with 'auth.enabled' and 'auth.keys'" in answer.text
            assert (await http.get("/v1/organizations")).json() == {"app": "other"}


ODD_IDS = ["x", "proj_", "%00", "a%00b", "%2e%2e", "a%2Fb", "%F0%28", "' OR 1=1 --", "a" * 5000, "%", "*", "é", "%09"]


async def test_an_id_that_is_none(admin: Admin) -> None:
    ops = f"/projects/{admin.store.project('acme', 'ops').id}"
    # Those with an id in their path: of a project, and of something that a project has.
    asked = [(method, path) for method, path in PATHS if "/x" in path or "/y" in path]
    async with admin.http() as http:
        for odd in ODD_IDS:
            for method, path in asked:
                within = path.replace("/projects/x", ops) if "/y" in path else path.replace("/x", f"/{odd}")
                answer = await http.request(method, within.replace("/y", f"/{odd}"), json={"name": "x"})
                assert answer.status_code in (404, 405), (method, path, odd, answer.text)
                assert answer.json()["error"]["message"]


async def test_what_is_of_another_project(admin: Admin) -> None:
    async with admin.client() as client:
        projects = client.admin.organization.projects
        one, two = [await projects.create(name=name) for name in ("one", "two")]
        account = await projects.service_accounts.create(one.id, name="app")
        assert account.api_key is not None
        key = account.api_key.id
        for ask in (
            projects.api_keys.retrieve(key, project_id=two.id),
            projects.api_keys.delete(key, project_id=two.id),
            projects.service_accounts.retrieve(account.id, project_id=two.id),
            projects.service_accounts.update(account.id, project_id=two.id, name="x"),
            projects.service_accounts.delete(account.id, project_id=two.id),
            projects.service_accounts.api_keys.create(account.id, project_id=two.id),
        ):
            with pytest.raises(openai.NotFoundError) as error:
                await ask
            assert error.value.type == "NotFoundError"
        assert admin.lets_in(account.api_key.value)


WRONG_BODIES: Any = [
    ("/projects", b"", "body"),
    ("/projects", b"[]", "body"),
    ("/projects", b"{", "body"),
    ("/projects", b"[" * 100_000, "body"),
    ("/projects", b"{}", "name"),
    ("/projects", {"name": ""}, "name"),
    ("/projects", {"name": " "}, "name"),
    ("/projects", {"name": 1}, "name"),
    ("/projects", {"name": "a\x00b"}, "name"),
    ("/projects", b'{"name": "\\ud800"}', "name"),
    ("/projects", {"name": "a" * 256}, "name"),
    ("/projects", {"name": "a", "geography": "EU"}, "geography"),
    ("/projects/OPS", {"title": "a"}, "title"),
    ("/projects/OPS/service_accounts", {"name": "a", "expires_in_seconds": 0}, "expires_in_seconds"),
    ("/projects/OPS/service_accounts", {"name": "a", "expires_in_seconds": 1 << 70}, "expires_in_seconds"),
    (
        "/projects/OPS/service_accounts",
        {"name": "a", "expires_in_seconds": 5, "create_service_account_only": True},
        "expires_in_seconds",
    ),
    ("/projects/OPS/service_accounts/APP/api_keys", {"scopes": ["admin"]}, "scopes"),
    ("/projects/OPS/service_accounts/APP/api_keys", {"scopes": ["api.all.read"]}, "scopes"),
    ("/projects/OPS/service_accounts/APP/api_keys", {"scopes": "batch"}, "scopes"),
    ("/admin_api_keys", {}, "name"),
    ("/admin_api_keys", {"name": "a", "expires_in_seconds": -1}, "expires_in_seconds"),
]


async def test_a_body_that_is_wrong_is_named(admin: Admin) -> None:
    async with admin.http() as http:
        ops = admin.store.project("acme", "ops").id
        app = (await http.post(f"/projects/{ops}/service_accounts", json={"name": "app"})).json()["id"]
        before = admin.store.count_changes()
        for path, body, named in WRONG_BODIES:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = await http.post(path.replace("OPS", ops).replace("APP", app), content=content)
            assert answer.status_code == 400, (path, named, answer.text)
            error = answer.json()["error"]
            assert f"{named}: " in error["message"]
            assert error["type"] == "BadRequestError"
        assert admin.store.count_changes() == before


async def test_a_body_that_is_too_large(admin: Admin) -> None:
    async with admin.http() as http:
        assert (await http.post("/projects", content=b" " * (2 << 20))).status_code == 413


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limit=st.integers(1, 7),
    plan=st.lists(st.sampled_from(["make", "archive"]), max_size=6),
    order=st.sampled_from(["asc", "desc"]),
)
def test_pages_are_the_list(store: AdminStore, limit: int, plan: list[str], order: Any) -> None:
    """Whatever is made or ended meanwhile, what was there before and after is seen once, in order."""
    for _ in range(5):
        store.add_project("acme", "项目")
    before = [project.id for project in store.page_of_projects(None, 1000, archived=False)]
    seen: list[str] = []
    steps = list(plan)
    while page := store.page_of_projects(seen[-1] if seen else None, limit, archived=False):
        assert len(page) <= limit
        seen += [project.id for project in page]
        if steps:
            if steps.pop() == "make":
                store.add_project("acme", "项目")
            else:
                # The cursor itself.
                store.archive_by_id(seen[-1])
    after = {project.id for project in store.page_of_projects(None, 1000, archived=False)}
    assert seen == sorted(set(seen))
    assert [project for project in before if project in after] == [one for one in seen if one in {*before} & after]
    some = store.project_by_id(before[0])
    made = [store.create_key(some, "key", scopes=["admin"])[0].id for _ in range(3)] if before[0] in after else []
    listed: list[str] = []
    while keys := store.page_of_keys(None, listed[-1] if listed else None, limit, order):
        listed += [key.id for key in keys]
    assert listed == sorted(set(listed), reverse=order == "desc")
    assert set(made) <= set(listed)


@pytest.fixture
def store(engine: Any) -> AdminStore:
    return AdminStore(engine, "test")


async def test_the_schema_has_its_routes(admin: Admin) -> None:
    from fastapi import FastAPI

    settings = Auth(enabled=True, database="sqlite:////nowhere/keys.db")
    async with open_administration(settings) as administration:
        app = with_admin(administration, Http(), FastAPI())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as http:
            paths = (await http.get("/openapi.json")).json()["paths"]
    assert set(paths["/v1/organization/projects/{project_id}"]) == {"get", "post"}
    names = {each["name"] for each in paths["/v1/organization/audit_logs"]["get"]["parameters"]}
    assert {"event_types[]", "effective_at[gte]", "after", "limit"} <= names


# Of two threads that lose their server at once, one's connection is left to the collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*BaseConnection:pytest.PytestUnraisableExceptionWarning")
async def test_the_database_is_away_and_back(admin: Admin, request: pytest.FixtureRequest, tmp_path: Any) -> None:
    on_postgres = "postgresql" in request.node.callspec.id
    server: Postgres | None = request.getfixturevalue("server") if on_postgres else None
    file, elsewhere = tmp_path / "keys.db", tmp_path / "elsewhere.db"
    async with admin.http() as http:
        assert (await http.get("/projects")).status_code == 200
        if server is not None:
            await asyncio.to_thread(server.kill)
        else:
            file.rename(elsewhere)
        for method, path in PATHS[:2] + PATHS[-9:-4]:
            answer = await http.request(method, path, json={"name": "x"})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), (method, path, answer.text)
            assert answer.json()["error"]["message"] == "admin API: the database of keys is away"
        # Many at once are not answered one after the other for ever, and the event loop goes on.
        many = await asyncio.gather(*(http.get("/projects") for _ in range(100)))
        assert {answer.status_code for answer in many} == {503}
        assert (await http.get(f"{admin.url}/health")).status_code == 200
        if server is not None:
            await asyncio.to_thread(server.start)
        else:
            elsewhere.rename(file)
        assert (await http.get("/projects")).status_code == 200
    # The client's own retries carry it over.
    async with admin.client() as client:
        assert (await client.admin.organization.projects.create(name="after")).name == "after"
    # Here, and not in another test.
    gc.collect()
