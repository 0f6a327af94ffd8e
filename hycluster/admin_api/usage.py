"""Usage and costs out of the ledger, by spans of time, as OpenAI's admin API tells them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from hycluster.admin_api.administration import RETRY_AFTER_S, Administration
from hycluster.auth.store import Project
from hycluster.errors import InvalidInput, NotFound, Unavailable
from hycluster.ledger.usage import Dimension, UsageSum, sum_usage

logger = logging.getLogger(__name__)

WIDTHS_S = {"1m": 60, "1h": 3600, "1d": 86400}
# Of spans on a page: what there is without being asked, and at most.
SPANS = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}
MOST_COST_DAYS = 180
# Of the ledger that is read for a page there is much: one reads at a time.
MOST_READING = 16
PAGE = "page_"
# What asks a model for no tokens.
NO_COMPLETION = ("/v1/embeddings", "/v1/score", "/v1/rerank", "/pooling", "/classify")
_FIGURES = ("requests", "input_tokens", "cached_tokens", "output_tokens", "cost")

_Value = Annotated[str, Field(max_length=400, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Time = Annotated[int, Field(ge=0, le=1 << 36)]


def _listed(name: str) -> Any:
    return Field(default=[], alias=f"{name}[]", max_length=100)


class LedgerQuery(BaseModel):
    """What both routes are asked. A filter that is not known is refused."""

    model_config = ConfigDict(extra="forbid")

    start_time: _Time
    end_time: _Time | None = None
    page: Annotated[str, Field(pattern=rf"^{PAGE}[0-9]{{1,11}}$")] | None = None
    project_ids: list[_Value] = _listed("project_ids")
    api_key_ids: list[_Value] = _listed("api_key_ids")


class CompletionsQuery(LedgerQuery):
    bucket_width: Literal["1m", "1h", "1d"] = "1d"
    group_by: list[Literal["project_id", "api_key_id", "model", "batch"]] = _listed("group_by")
    models: list[_Value] = _listed("models")
    batch: bool | None = None
    limit: int | None = Field(default=None, ge=1)


class CostsQuery(LedgerQuery):
    bucket_width: Literal["1d"] = "1d"
    group_by: list[Literal["project_id", "api_key_id", "line_item"]] = _listed("group_by")
    line_items: list[_Value] = _listed("line_items")
    limit: int = Field(default=7, ge=1, le=MOST_COST_DAYS)


# What of a group a result names: a dimension of the ledger, or the project's id, or whether it was a batch's.
_BY = {"project_id": "project_id", "api_key_id": "key", "model": "model", "line_item": "model", "batch": "batch"}
_Row = dict[str, Any]


class _Ledger:
    """The ledger, read off the event loop, with projects by their ids."""

    def __init__(self, administration: Administration) -> None:
        self._administration = administration
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="admin-usage")
        self._waiting = 0

    async def spans(
        self,
        asked: LedgerQuery,
        width_s: int,
        limit: int,
        chosen: Callable[[_Row], bool],
        result: Callable[[_Row], _Row],
    ) -> _Row:
        """A page of spans; those without usage have no results."""
        books = self._administration.books
        if books is None:
            raise NotFound("usage: is here only with 'ledger.enabled' in the settings")
        end = int(time.time()) + 1 if asked.end_time is None else asked.end_time
        if end <= asked.start_time:
            raise InvalidInput("end_time: must be after 'start_time'")
        first = asked.start_time if asked.page is None else max(asked.start_time, int(asked.page.removeprefix(PAGE)))
        begin = first - first % width_s
        stop = min(begin + limit * width_s, end)
        projects = await self._administration.ask(lambda store: store.managed_projects())
        rows = await self._read(lambda: sum_usage(books, _DIMENSIONS, since=first, until=stop, bucket_s=width_s))
        groups = [_BY[name] for name in getattr(asked, "group_by", ())]
        found = _together((row for row in _rows(rows, projects) if _fits(row, asked) and chosen(row)), groups)
        data = [
            {"object": "bucket", "start_time": at, "end_time": at + width_s, "results": [result(r) for r in found[at]]}
            for at in range(begin, stop, width_s)
        ]
        more = stop < end
        return {"object": "page", "data": data, "has_more": more, "next_page": f"{PAGE}{stop}" if more else None}

    async def _read(self, work: Callable[[], list[UsageSum]]) -> list[UsageSum]:
        if self._waiting >= MOST_READING:
            raise Unavailable(f"usage: {self._waiting} requests wait for the ledger", retry_after_s=RETRY_AFTER_S)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except OSError as error:
            logger.warning("the ledger can't be read: %s", error)
            raise Unavailable("usage: the ledger can't be read now", retry_after_s=RETRY_AFTER_S) from None
        finally:
            self._waiting -= 1


_DIMENSIONS: tuple[Dimension, ...] = ("tenant", "project", "key", "model", "tier", "operation")


def usage_routes(administration: Administration) -> APIRouter:
    """``/usage/completions`` and ``/costs``."""
    routes, ledger = APIRouter(), _Ledger(administration)

    @routes.get("/usage/completions")
    async def usage_completions(asked: Annotated[CompletionsQuery, Query()]) -> Any:
        usual, most = SPANS[asked.bucket_width]
        limit = usual if asked.limit is None else asked.limit
        if limit > most:
            raise InvalidInput(
                f"limit: {limit} is not allowed; at most {most} with bucket_width {asked.bucket_width!r}"
            )

        def chosen(row: _Row) -> bool:
            of_models = not asked.models or row["model"] in asked.models
            return of_models and asked.batch in (None, row["batch"]) and row["completes"]

        return await ledger.spans(asked, WIDTHS_S[asked.bucket_width], limit, chosen, _usage)

    @routes.get("/costs")
    async def costs(asked: Annotated[CostsQuery, Query()]) -> Any:
        def chosen(row: _Row) -> bool:
            return not asked.line_items or row["model"] in asked.line_items

        currency = administration.currency
        return await ledger.spans(asked, WIDTHS_S["1d"], asked.limit, chosen, lambda row: _cost(row, currency))

    return routes


def _rows(sums: Iterable[UsageSum], projects: Mapping[tuple[str, str], Project]) -> Iterable[_Row]:
    for each in sums:
        group = each.group
        owner = group["tenant"], group["project"]
        known = projects.get(owner)
        yield {
            "start_at": each.start_at,
            # A token's project needs not be in the database.
            "project_id": known.id if known else "/".join(owner),
            "key": group["key"],
            "model": group["model"],
            "batch": group["tier"] == "batch",
            "completes": not group["operation"].endswith(NO_COMPLETION),
            **{name: getattr(each, name) for name in _FIGURES},
        }


def _fits(row: _Row, asked: LedgerQuery) -> bool:
    of_project = not asked.project_ids or row["project_id"] in asked.project_ids
    return of_project and (not asked.api_key_ids or row["key"] in asked.api_key_ids)


def _together(rows: Iterable[_Row], groups: Sequence[str]) -> dict[int, list[_Row]]:
    """By span the sums of each group."""
    sums: dict[int, dict[tuple[Any, ...], _Row]] = defaultdict(dict)
    for row in rows:
        group = {name: row[name] for name in groups}
        summed = sums[row["start_at"]].setdefault(tuple(group.values()), group | dict.fromkeys(_FIGURES, 0))
        for name in _FIGURES:
            summed[name] += row[name]
    return defaultdict(list, {at: list(by_group.values()) for at, by_group in sums.items()})


def _usage(row: _Row) -> _Row:
    return {
        "object": "organization.usage.completions.result",
        "num_model_requests": row["requests"],
        "input_tokens": row["input_tokens"],
        "input_cached_tokens": row["cached_tokens"],
        "input_uncached_tokens": row["input_tokens"] - row["cached_tokens"],
        "output_tokens": row["output_tokens"],
        "project_id": row.get("project_id"),
        "api_key_id": row.get("key"),
        "model": row.get("model"),
        "batch": row.get("batch"),
        "user_id": None,
        "service_tier": None,
    }


def _cost(row: _Row, currency: str) -> _Row:
    return {
        "object": "organization.costs.result",
        "amount": {"value": float(Decimal(row["cost"])), "currency": currency},
        "line_item": row.get("model"),
        "project_id": row.get("project_id"),
        "api_key_id": row.get("key"),
    }
