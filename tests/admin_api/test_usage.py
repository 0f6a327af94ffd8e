"""Usage and costs out of a ledger, by the official client."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from hycluster.admin_api.administration import Administration
from hycluster.admin_api.routes import admin_api
from hycluster.auth.caller import Caller, calling
from tests.admin_api.conftest import Admin
from tests.ledger.entries import MARCH, entry

pytestmark = pytest.mark.timeout(120)

START, HOUR_S, DAY_S = int(MARCH), 3600, 86400


@pytest.fixture
def ledger(admin: Admin) -> Admin:
    admin.books.commit(
        "a",
        [
            entry(project="ops"),
            entry(project="ops", key="key_2", key_name="laptop", model="n", tier="batch", ended_at=MARCH + HOUR_S),
            # Of another tenant's, which has the same name; it is in no database.
            entry(tenant="other", project="ops", ended_at=MARCH + HOUR_S),
            entry(project="ops", ended_at=MARCH + DAY_S, cost=Decimal("0.000001")),
            entry(project="ops", operation="POST /v1/embeddings", output_tokens=0),
        ],
    )
    return admin


async def test_usage(ledger: Admin) -> None:
    ops = ledger.store.project("acme", "ops").id
    async with ledger.client() as client:
        usage = client.admin.organization.usage
        page = await usage.completions(start_time=START, end_time=START + 2 * DAY_S)
        assert [(one.start_time, one.end_time) for one in page.data] == [
            (START, START + DAY_S),
            (START + DAY_S, START + 2 * DAY_S),
        ]
        assert (page.has_more, page.next_page, page.object) == (False, None, "page")
        first: Any
        (first,) = page.data[0].results
        assert (first.object, first.num_model_requests, first.input_tokens, first.output_tokens) == (
            "organization.usage.completions.result", 3, 30, 15,
        )  # fmt: skip
        assert (first.input_cached_tokens, first.input_uncached_tokens, first.model) == (12, 18, None)

        async def groups(**asked: Any) -> list[dict[str, Any]]:
            found = await usage.completions(start_time=START, end_time=START + DAY_S, **asked)
            names = ("project_id", "api_key_id", "model", "batch", "num_model_requests")
            results: list[Any] = [result for bucket in found.data for result in bucket.results]
            return [{name: value for name in names if (value := getattr(one, name)) is not None} for one in results]

        assert await groups(group_by=["project_id", "batch"]) == [
            {"project_id": ops, "batch": False, "num_model_requests": 1},
            {"project_id": ops, "batch": True, "num_model_requests": 1},
            {"project_id": "other/ops", "batch": False, "num_model_requests": 1},
        ]
        assert await groups(group_by=["api_key_id", "model"], project_ids=[ops]) == [
            {"api_key_id": "key_1", "model": "m", "num_model_requests": 1},
            {"api_key_id": "key_2", "model": "n", "num_model_requests": 1},
        ]
        for filtered in ({"api_key_ids": ["key_2"]}, {"models": ["n"]}, {"batch": True}):
            assert await groups(**filtered) == [{"num_model_requests": 1}]
        assert await groups(project_ids=["proj_none"]) == []


async def test_pages_of_spans_are_the_whole(ledger: Admin) -> None:
    async with ledger.client() as client:
        usage = client.admin.organization.usage
        asked: Any = {"start_time": START + 7, "end_time": START + 5 * HOUR_S + 7, "bucket_width": "1h"}
        whole = await usage.completions(**asked)
        assert [one.start_time for one in whole.data] == [START + number * HOUR_S for number in range(6)]
        # What ended before the start is not counted, though its span is shown.
        assert [len(one.results) for one in whole.data] == [0, 1, 0, 0, 0, 0]
        seen: list[Any] = []
        page: str | None = None
        while True:
            more: Any = {"page": page} if page else {}
            found = await usage.completions(**asked, limit=4, **more)
            seen += found.data
            page = found.next_page
            assert found.has_more is (page is not None)
            if page is None:
                break
        assert seen == whole.data


async def test_costs(ledger: Admin) -> None:
    async with ledger.client() as client:
        costs = await client.admin.organization.usage.costs(start_time=START, end_time=START + 2 * DAY_S)
        found: list[Any] = [result for bucket in costs.data for result in bucket.results]
        assert [(one.object, one.amount.value, one.amount.currency) for one in found] == [
            ("organization.costs.result", 1.0, "usd"),
            ("organization.costs.result", 0.000001, "usd"),
        ]
        by_model = await client.admin.organization.usage.costs(
            start_time=START, end_time=START + DAY_S, group_by=["line_item"]
        )
        items: Any = by_model.data[0].results
        assert {one.line_item: one.amount.value for one in items} == {"m": 0.75, "n": 0.25}


async def test_what_is_asked_wrong_is_named(ledger: Admin) -> None:
    async with ledger.http() as http:
        for path, query, named in (
            ("/usage/completions", "", "start_time"),
            ("/usage/completions", "start_time=-1", "start_time"),
            ("/usage/completions", f"start_time={START}&end_time={START}", "end_time"),
            ("/usage/completions", f"start_time={START}&limit=32", "limit"),
            ("/usage/completions", f"start_time={START}&bucket_width=1m&limit=1441", "limit"),
            ("/usage/completions", f"start_time={START}&bucket_width=2d", "bucket_width"),
            ("/usage/completions", f"start_time={START}&group_by[]=user_id", "group_by[]"),
            ("/usage/completions", f"start_time={START}&user_ids[]=me", "user_ids[]"),
            ("/usage/completions", f"start_time={START}&page=x", "page"),
            ("/costs", f"start_time={START}&bucket_width=1h", "bucket_width"),
            ("/costs", f"start_time={START}&limit=181", "limit"),
        ):
            answer = await http.get(f"{path}?{query}")
            assert answer.status_code == 400, (path, query)
            assert answer.json()["error"]["message"].startswith(named), answer.text


async def test_without_a_ledger_and_with_one_that_is_away(engine: Any, ledger: Admin, tmp_path: Any) -> None:
    administration = Administration(engine)
    app: FastAPI = admin_api(administration)
    path = f"/v1/organization/costs?start_time={START}"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as http:
        with calling(Caller("acme", "ops", "root", scopes=frozenset({"admin"}))):
            answer = await http.get(path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")
    administration.close()
    folder = tmp_path / "ledger"
    for part in folder.rglob("*.parquet"):
        part.unlink()
    async with ledger.client() as client:
        with pytest.raises(openai.InternalServerError) as away:
            await client.admin.organization.usage.costs(start_time=START)
        assert (away.value.status_code, away.value.response.headers["retry-after"]) == (503, "1")
