"""``hycluster why``: where a request's time went, or which requests took longest."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from urllib.parse import quote

import typer

from hycluster.errors import (
    HyclusterError,
    NotFound,
    PermissionDenied,
    SettingsError,
    Unauthenticated,
    Unavailable,
    shown,
)
from hycluster.stages import KEPT, MEANINGS
from hycluster.terminal import console, echo, printable

if TYPE_CHECKING:
    from rich.table import Table

BAR_CELLS = 30
# Columns that the rest of a list takes at least.
LEAST_BESIDE_IDS = 40
MOST = 1000
ANSWER_TIMEOUT_S = 30.0
# As ``hycluster/ingress`` has them, which is too much to import for a command.
ROUTE, KIND_HEADER = "/hycluster/requests", "X-Hycluster-Error"

Listed = Literal["online", "batch"]
T = TypeVar("T")
Told = dict[str, Any]


def why(
    request_id: Annotated[
        str | None,
        typer.Argument(
            metavar="[REQUEST_ID]",
            help="As in an answer's x-request-id, or the id in its body; or the id of a batch row: FILE#NUMBER.",
        ),
    ] = None,
    slowest: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=MOST, help="List the N requests that took longest.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="With --slowest: of this model only.")] = None,
    priority: Annotated[
        Listed | None, typer.Option(help="With --slowest: online requests (the default), or rows of batch work.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Ray cluster, or http://HOST:PORT of an HTTP ingress; default: RAY_ADDRESS, or what this"
            " HYCLUSTER_HOME has started.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where the time of REQUEST_ID went, stage by stage, without any tracing backend.

    Each process of a service keeps the timelines of its last requests, and of the slowest of the last hour.
    """
    if (request_id is None) == (slowest is None):
        raise SettingsError("REQUEST_ID, --slowest: exactly one must be given")
    if model is not None and slowest is None:
        raise SettingsError("--model: goes with --slowest only")
    if priority is not None and slowest is None:
        raise SettingsError("--priority: goes with --slowest only")
    if slowest is not None:
        bulk = priority == "batch"
        listed = _asked(address, _listed(slowest, model, bulk), lambda known: known.slowest(slowest, model, bulk))
        if as_json:
            echo(json.dumps({"requests": listed}, indent=2))
        elif not listed:
            of = f" of {shown(model)}" if model else ""
            kind, other = ("row of batch work", "online") if bulk else ("online request", "batch")
            echo(f"no {kind}{of} is known; of others tells --priority {other}")
        else:
            screen = console()
            screen.print(_list(listed, screen.width))
        return
    assert request_id is not None
    found = _asked(address, f"/{quote(request_id, safe='')}", lambda known: known.timeline(request_id))
    if found is None:
        # That of a row has its file's name before it.
        rows = ", and of a batch job's rows they are gone with the job's process" if "#" in request_id else ""
        raise NotFound(f"REQUEST_ID: no process knows a request {shown(request_id)}; {KEPT}{rows}")
    if as_json:
        echo(json.dumps(as_stages(found), indent=2))
    else:
        _show(found)


def as_stages(found: Told) -> Told:
    """A timeline as this command's JSON has it."""
    stages = [
        {
            "name": span["name"],
            "process": span["process"],
            "start_s": span["start_s"],
            "duration_s": span["duration_s"],
            "replica": span["attributes"].get("replica"),
        }
        for span in found["spans"]
    ]
    rest = {name: value for name, value in found.items() if name not in ("id", "duration_s", "spans", "events")}
    return {
        "request_id": found["id"],
        "total_s": found["duration_s"],
        "stages": stages,
        "events": found["events"],
        **rest,
    }


class _Known:
    """What the processes of a cluster know, by its directory."""

    def __init__(self, directory: Any) -> None:
        self._directory = directory

    async def timeline(self, request_id: str) -> Told | None:
        from hycluster.gateway.asking import timeline_of

        return await timeline_of(self._directory, request_id)

    async def slowest(self, most: int, model: str | None, bulk: bool) -> list[Told]:
        from hycluster.gateway.asking import slowest

        return await slowest(self._directory, most, model, bulk=bulk)


def _asked(address: str | None, path: str, by_ray: Callable[[_Known], Coroutine[Any, Any, T]]) -> Any:
    if address is not None and "://" in address:
        return _by_http(address, path)
    import ray

    from hycluster import cluster
    from hycluster.directory.directory import find_directory

    cluster.join_cluster(address)
    try:
        return asyncio.run(by_ray(_Known(find_directory())))
    except ValueError:
        raise SettingsError(
            "--address: no hycluster is running in this Ray cluster; start one with 'hycluster serve'"
        ) from None
    finally:
        ray.shutdown()


def _listed(slowest: int, model: str | None, bulk: bool) -> str:
    of_model = f"&model={quote(model, safe='')}" if model else ""
    return f"?slowest={slowest}{of_model}" + "&priority=batch" * bulk


def _by_http(address: str, path: str) -> Any:
    import httpx

    from hycluster.client import AUTHORITIES_VARIABLE, https_context, key_header

    if not address.startswith(("http://", "https://")):
        raise SettingsError(f"--address: {shown(address)} is not allowed; must be HOST:PORT, or http://HOST:PORT")
    trusted = https_context()
    try:
        answer = httpx.get(
            f"{address.rstrip('/')}{ROUTE}{path}",
            headers=key_header(),
            timeout=ANSWER_TIMEOUT_S,
            verify=trusted,
        )
        said = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        hint = f"; {AUTHORITIES_VARIABLE} names the file of its authority" if "VERIFY_FAILED" in str(error) else ""
        raise Unavailable(f"--address: {address} does not answer as an HTTP ingress does: {error}{hint}") from None
    if answer.status_code == NotFound.http_status:
        if answer.headers.get(KIND_HEADER) == NotFound.__name__:
            return None
        raise SettingsError(
            f"--address: {address} does not tell (http.ui is off there); ask its Ray cluster, by HOST:PORT of it"
        )
    for refusal in (Unauthenticated, PermissionDenied):
        if answer.status_code == refusal.http_status:
            raise refusal(f"--address: {address}: {_message_in(said) or refusal.http_status}")
    if answer.is_error:
        told = _message_in(said) or answer.text[:300]
        raise HyclusterError(f"--address: {address} answered {answer.status_code}: {told}")
    return said.get("requests", said)


def _message_in(said: Any) -> str:
    """Of an error as an HTTP ingress tells it; what stands in front of one has another form."""
    error = said.get("error") if isinstance(said, dict) else None
    return str(error.get("message") or "") if isinstance(error, dict) else ""


# -- for people -------------------------------------------------------------------------------------


def _show(found: Told) -> None:
    total_s = found["duration_s"]
    out = console()
    out.print(f"{found['id']}  {found['model']}  {found['status']}  {_time(total_s)}  since {found['started']}")
    said = [f"{found['operation']} at {found['process']} {found.get('instance', '')}".rstrip()]
    if found.get("ttft_s") is not None:
        said.append(f"first token after {_time(found['ttft_s'])}")
    said.append(f"{found['prompt_tokens']} tokens in ({found['cached_tokens']} cached), {found['output_tokens']} out")
    if found["trace_id"]:
        said.append(f"trace {found['trace_id']}")
    out.print("; ".join(said))
    if found["error"]:
        out.print(f"error: {printable(found['error'])}")
    out.print(_stages(found["spans"], total_s))
    if moves := [event["attributes"] for event in found["events"] if event["name"] == "migrated"]:
        for move in moves:
            out.print(f"migrated from {move['from']} to {move['to']} with {move['tokens_kept']} tokens")
    for event in found["events"]:
        if event["name"] == "routed":
            scores = ", ".join(f"{name}: {score}" for name, score in event["attributes"]["candidates"].items())
            out.print(f"routed to {event['attributes']['replica']} at {_time(event['at_s'])} (tokens there: {scores})")


def _stages(spans: list[Told], total_s: float) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, side in (("stage", "left"), ("at", "right"), ("time", "right"), ("share", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    table.add_column("", no_wrap=True)
    table.add_column("what")
    for span in _together(spans):
        share = span["duration_s"] / total_s if total_s else 0.0
        replica = span["attributes"].get("replica")
        meaning = MEANINGS.get(span["name"], "") + (f" ({replica})" if replica and span["process"] == "engine" else "")
        table.add_row(
            span["name"],
            _time(span["start_s"]),
            _time(span["duration_s"]),
            f"{share:.0%}",
            _bar(span["start_s"], span["duration_s"], total_s),
            meaning,
        )
    return table


def _together(spans: list[Told]) -> list[Told]:
    """Stages that came many times, as those of a row that was preempted again and again, as one."""
    if len(spans) <= 20:
        return spans
    found: dict[tuple[str, Any], Told] = {}
    for span in spans:
        key = span["name"], span["attributes"].get("replica")
        if key in found:
            found[key]["duration_s"] += span["duration_s"]
        else:
            found[key] = dict(span)
    return list(found.values())


def _bar(start_s: float, duration_s: float, total_s: float) -> str:
    if not total_s:
        return ""
    first = min(BAR_CELLS - 1, round(start_s / total_s * BAR_CELLS))
    cells = max(1, round(duration_s / total_s * BAR_CELLS))
    return " " * first + "█" * min(cells, BAR_CELLS - first)


def _list(listed: list[Told], columns: int) -> Table:
    """Ids whole, for they are asked about next; the rest is folded where the screen is narrow."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    longest = max((len(each["id"]) for each in listed), default=0)
    table.add_column("request", no_wrap=longest + LEAST_BESIDE_IDS <= columns, overflow="fold")
    for name in ("model", "status", "started", "time", "first token", "mostly"):
        table.add_column(name, justify="right" if name in ("time", "first token") else "left", overflow="fold")
    for each in listed:
        table.add_row(
            each["id"],
            each["model"],
            each["status"],
            each["started"],
            _time(each["duration_s"]),
            "" if each["ttft_s"] is None else _time(each["ttft_s"]),
            each["slowest_stage"] or "",
        )
    return table


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
