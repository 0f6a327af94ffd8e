"""A project's rate limits, by the official client, against those that ``hycluster limits`` sets."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from hycluster.auth.limits import Limit
from tests.admin_api.conftest import Admin

pytestmark = pytest.mark.timeout(120)


async def test_limits_are_set_changed_and_taken_away(admin: Admin) -> None:
    ops = admin.store.project("acme", "ops").id
    async with admin.client() as client:
        limits = client.admin.organization.projects.rate_limits
        assert [one async for one in limits.list_rate_limits(ops)] == []
        made: Any = await limits.update_rate_limit("rl-org/tiny", project_id=ops, max_requests_per_1_minute=60)
        assert (made.id, made.model, made.object) == ("rl-org/tiny", "org/tiny", "project.rate_limit")
        assert (made.max_requests_per_1_minute, made.max_tokens_per_1_minute) == (60, None)
        # What a command has set stays, and others' are not shown.
        admin.store.set_limit(Limit("acme", "ops", None, "org/tiny", requests_per_minute=60, tokens_per_day=9))
        for other in (Limit("acme"), Limit("acme", "ops", "key_1"), Limit("other", "ops")):
            admin.store.set_limit(Limit(other.tenant, other.project, other.key_id, None, requests_per_minute=1))
        await limits.update_rate_limit("rl-org/tiny", project_id=ops, max_tokens_per_1_minute=1000)
        assert Limit("acme", "ops", None, "org/tiny", 60, 1000, 9) in admin.store.limits()
        await limits.update_rate_limit("rl", project_id=ops, max_requests_per_1_minute=6, max_tokens_per_1_minute=7)
        found = [(one.id, one.model) async for one in limits.list_rate_limits(ops, limit=1)]
        assert found == [("rl", "*"), ("rl-org/tiny", "org/tiny")]
        nothing: Any = None
        await limits.update_rate_limit(
            "rl", project_id=ops, max_requests_per_1_minute=nothing, max_tokens_per_1_minute=nothing
        )
        assert [one.id async for one in limits.list_rate_limits(ops)] == ["rl-org/tiny"]
        events = (await client.admin.organization.audit_logs.list(limit=2)).data
        assert [event.type for event in events] == ["rate_limit.deleted", "rate_limit.updated"]
        assert events[1].rate_limit_updated is not None
        assert events[1].rate_limit_updated.changes_requested is not None
        assert events[1].rate_limit_updated.changes_requested.max_requests_per_1_minute == 6
        assert {change.actor for change in admin.store.audit()[-2:]} == {"key acme/ops/root"}


async def test_what_is_none(admin: Admin) -> None:
    ops = admin.store.project("acme", "ops").id
    async with admin.client() as client:
        limits = client.admin.organization.projects.rate_limits
        for odd in ("x", "rl-", "rl--", "rl-a b", "rl-\x00", "rl-" + "a" * 201, "rlx"):
            with pytest.raises(openai.NotFoundError):
                await limits.update_rate_limit(odd, project_id=ops, max_requests_per_1_minute=1)
        with pytest.raises(openai.NotFoundError):
            await limits.update_rate_limit("rl", project_id="proj_none", max_requests_per_1_minute=1)
    async with admin.http() as http:
        for body, named in (
            ({}, "body"),
            ({"max_requests_per_1_minute": 0}, "max_requests_per_1_minute"),
            ({"max_tokens_per_1_minute": "x"}, "max_tokens_per_1_minute"),
            ({"max_images_per_1_minute": 1}, "max_images_per_1_minute"),
        ):
            answer = await http.post(f"/projects/{ops}/rate_limits/rl", json=body)
            assert answer.status_code == 400
            assert f"{named}: " in answer.json()["error"]["message"]
        assert (await http.get(f"/projects/{ops}/rate_limits?limit=101")).status_code == 400
        assert (await http.get("/projects/proj_none/rate_limits")).status_code == 404
    assert admin.store.limits() == []
