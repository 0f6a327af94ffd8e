"""``hycluster limits``: how much a key, a project or a tenant may use."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hycluster.consent import Yes, ask
from hycluster.errors import InvalidInput, shown
from hycluster.tenants.acted_on import DEFAULT_TENANT, Config, store_of
from hycluster.tenants.printed import AsJson, print_records
from hycluster.terminal import echo

if TYPE_CHECKING:
    from hycluster.auth.limits import Limit
    from hycluster.auth.store import KeyStore

limits_app = typer.Typer(name="limits", help="Set, list and remove limits of keys, projects and tenants.",
                         no_args_is_help=True)  # fmt: skip

Project = Annotated[str | None, typer.Option("--project", metavar="NAME", help="Of a project of the tenant.")]
Tenant = Annotated[
    str | None,
    typer.Option("--tenant", metavar="NAME", help="Of a tenant; with --project, whose project it is ('default')."),
]
Key = Annotated[str | None, typer.Option("--key", metavar="ID", help="Of a key, as 'hycluster keys list' says.")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="For this model or adapter alone. Default: all together.")
]
Amount = Annotated[int | None, typer.Option(min=1, metavar="N")]
MOST_BUDGET = 10**9


@dataclass(frozen=True, slots=True)
class _Listed:
    """A limit as it is printed; the budget in the currency."""

    tenant: str
    project: str | None
    key: str | None
    model: str | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    tokens_per_day: int | None
    concurrent_requests: int | None
    budget_per_month: float | None


@limits_app.command("set")
def set_limit(
    project: Project = None,
    tenant: Tenant = None,
    key: Key = None,
    model: Model = None,
    requests_per_minute: Amount = None,
    tokens_per_minute: Amount = None,
    tokens_per_day: Amount = None,
    concurrent_requests: Amount = None,
    budget_per_month: Annotated[str | None, typer.Option(metavar="N", help="In auth.currency.")] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Set what is given; what was set before and is not given stays. Known at every process in 2 s."""
    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
        "concurrent_requests": concurrent_requests,
        "budget_per_month": None if budget_per_month is None else _billionths(budget_per_month),
    }
    changed: dict[str, Any] = {kind: value for kind, value in given.items() if value is not None}
    if not changed:
        raise InvalidInput("limits set: needs at least one limit, such as --requests-per-minute 600")
    store = store_of(config)
    whose = _whose(store, project, tenant, key, model)
    before = next((limit for limit in store.limits() if limit.subject == whose.subject), whose)
    after = replace(before, **changed)
    store.set_limit(after)
    _say_what_is_not_there(store, after)
    echo(json.dumps(asdict(_listed(after)), indent=2) if as_json else f"{_told(after)}: {_values(after)}")


@limits_app.command("list")
def list_limits(project: Project = None, tenant: Tenant = None, config: Config = None, as_json: AsJson = False) -> None:
    """List limits."""
    found = [
        _listed(limit)
        for limit in store_of(config).limits()
        if project in (None, limit.project) and tenant in (None, limit.tenant)
    ]
    columns = tuple(field for field in _Listed.__dataclass_fields__)
    print_records(found, as_json, columns)


@limits_app.command("remove")
def remove_limit(
    project: Project = None,
    tenant: Tenant = None,
    key: Key = None,
    model: Model = None,
    config: Config = None,
    yes: Yes = False,
) -> None:
    """Remove all limits of a key, a project or a tenant, for all models or, with --model, those for this one."""
    store = store_of(config)
    whose = _whose(store, project, tenant, key, model)
    ask(f"{_told(whose)} will be limited no more", yes=yes)
    store.remove_limit(whose.subject)
    echo(f"{_told(whose)} is limited no more", err=True)


def _whose(store: KeyStore, project: str | None, tenant: str | None, key: str | None, model: str | None) -> Limit:
    """
    Raises:
        InvalidInput: it is nobody's, or of two.
        NotFound: there is no such key.
    """
    from hycluster.auth.limits import Limit
    from hycluster.auth.names import NAME

    if key is not None:
        if project is not None or tenant is not None:
            raise InvalidInput("--key: is not allowed with --project or --tenant; a key is of one project")
        found = store.key(key)
        return Limit(found.tenant, found.project, found.id, model)
    if project is None and tenant is None:
        raise InvalidInput("limits: whose? Give --project NAME, --tenant NAME or --key ID")
    for option, name in (("--tenant", tenant), ("--project", project)):
        if name is not None and not NAME.fullmatch(name):
            raise InvalidInput(f"{option}: {shown(name)} is not allowed; must be a name as 'hycluster projects' has it")
    return Limit(tenant or DEFAULT_TENANT, project, None, model)


def _say_what_is_not_there(store: KeyStore, limit: Limit) -> None:
    # No error: a project of a token's needs not be in the database.
    owners = {(one.tenant, one.name) for one in store.projects()}
    if limit.project is not None and (limit.tenant, limit.project) not in owners:
        echo(f"there is no project {limit.tenant}/{limit.project} yet", err=True)
    elif limit.tenant not in {tenant for tenant, _ in owners}:
        echo(f"there is no project of tenant {limit.tenant} yet", err=True)


def _billionths(said: str) -> int:
    from hycluster.auth.limits import BILLION

    try:
        amount = Decimal(said)
    except InvalidOperation:
        amount = Decimal("nan")
    if not (amount.is_finite() and 0 < amount <= MOST_BUDGET):
        raise InvalidInput(
            f"--budget-per-month: {shown(said)} is not allowed; must be a number, 0 < N <= {MOST_BUDGET}"
        )
    return int(amount * BILLION) or 1


def _listed(limit: Limit) -> _Listed:
    from hycluster.auth.limits import BILLION

    return _Listed(
        tenant=limit.tenant,
        project=limit.project,
        key=limit.key_id,
        model=limit.model,
        requests_per_minute=limit.requests_per_minute,
        tokens_per_minute=limit.tokens_per_minute,
        tokens_per_day=limit.tokens_per_day,
        concurrent_requests=limit.concurrent_requests,
        budget_per_month=None if limit.budget_per_month is None else limit.budget_per_month / BILLION,
    )


def _told(limit: Limit) -> str:
    whose = {"key": f"key {limit.key_id}", "project": f"project {limit.tenant}/{limit.project}"}
    return whose.get(limit.of, f"tenant {limit.tenant}") + (f" with model {limit.model}" if limit.model else "")


def _values(limit: Limit) -> str:
    values = asdict(_listed(limit))
    # To the last figure: 1000000 is not 1e+06 here, and 1234567 not 1.23457e+06.
    return ", ".join(f"{kind} {Decimal(str(values[kind])).normalize():f}" for kind in limit.values)
