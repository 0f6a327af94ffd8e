"""A run: the requests undisturbed, then the same under faults, then the comparison."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from hycluster import cluster
from hycluster.app import deployment_name
from hycluster.chaos.ask import http_client
from hycluster.chaos.faults import FaultInjector, Patience
from hycluster.chaos.gateways import Gateways
from hycluster.chaos.load import LoadCaller, drive, over_and_over
from hycluster.chaos.pool import IngressProcesses, members, served_model
from hycluster.chaos.report import Report, compare_outcomes
from hycluster.chaos.requests import WORDS, Ingress, Mix, requests
from hycluster.chaos.schedule import FaultOptions, schedule
from hycluster.chaos.targets import Targets
from hycluster.client import AsyncClient
from hycluster.door import IngressAddresses
from hycluster.errors import InvalidInput, Unavailable
from hycluster.serving import running_service

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ChaosPlan:
    """What to do, as the command line says it.

    Attributes:
        address, http, grpc: of the Ray cluster and its two ingresses; None is what is found, see
            ``cluster.join_cluster``.
        model: None is the only one served.
        streams: different requests.
        patience_s: for one request.
    """

    faults: FaultOptions
    patience: Patience
    address: str | None
    http: str | None
    grpc: str | None
    model: str | None
    ingresses: Sequence[Ingress]
    streams: int
    concurrency: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    features: Sequence[str]
    patience_s: float


def run_chaos(plan: ChaosPlan, say: Say, consent: Say) -> Report:
    """Do it.

    Args:
        consent: is told what is about to be hit; raises if that is not wanted.

    Raises:
        SettingsError: there is no such Ray cluster, or no hycluster in it.
        InvalidInput, UnknownModel: the model is not served, or its context is too short for the requests.
        Unavailable: it is not whole before the first fault.
    """
    found = running_service.find_service(cluster.join_cluster(plan.address))
    where = found.addresses
    if where is None:
        raise Unavailable(
            "health: the ingress processes are open, but a request would not succeed now; wait until it would"
        )
    if plan.faults.count:
        kinds, places = ", ".join(plan.faults.kinds), ", ".join(plan.faults.places)
        consent(f"{found}\n{plan.faults.count} faults ({kinds}) hit processes of it ({places}) under load")
    else:
        say(str(found))
    http, grpc = plan.http or where.http, plan.grpc or where.grpc
    return asyncio.run(_run(plan, http.rstrip("/"), grpc, _ports(where), say))


def _ports(where: IngressAddresses) -> tuple[int, ...]:
    return tuple(int(address.rpartition(":")[2]) for address in (where.http, where.grpc))


async def _run(plan: ChaosPlan, http: str, grpc: str, ports: tuple[int, ...], say: Say) -> Report:
    mix, name = await _mix(plan, grpc)
    asked = requests(mix)
    model = await asyncio.to_thread(served_model, name)
    targets = Targets(deployment_name(model))
    try:
        there, ingresses = await asyncio.to_thread(members, model), await asyncio.to_thread(targets.listening, ports)
        if there is None or not there.whole or not ingresses:
            ready, wanted = (len(there.replicas), there.wanted) if there else (0, model.replicas.count)
            raise Unavailable(
                f"model: {name!r} has {ready} of {wanted} replicas and {len(ingresses)} ingress processes before the"
                " first fault; wait until it is whole"
            )
        injector = FaultInjector(
            targets,
            model,
            IngressProcesses(len(ingresses), ports),
            plan.patience,
            wait=plan.faults.every_s is None,
            say=say,
        )
        async with http_client() as client:
            caller = LoadCaller(client, http, grpc, name, plan.patience_s)
            say(f"{len(asked)} requests undisturbed")
            reference = await drive(caller.ask, asked, plan.concurrency)
            say(f"the same under {plan.faults.count} faults")
            gateways = Gateways(client, http, model.name, len(ingresses))
            await gateways.begin()
            begun_s = time.monotonic()
            async with _injecting(injector, plan.faults) as over:
                watching = asyncio.create_task(gateways.watch())
                outcomes = await drive(caller.ask, over_and_over(asked, over.is_set), plan.concurrency)
                seconds = time.monotonic() - begun_s
                await _cancelled(watching)
            migrated = await gateways.end()
    finally:
        await asyncio.to_thread(targets.close)
    return compare_outcomes(name, plan.faults.seed, reference, outcomes, injector.injections, migrated, seconds)


@contextlib.asynccontextmanager
async def _injecting(injector: FaultInjector, wish: FaultOptions) -> AsyncIterator[asyncio.Event]:
    """Carry out the faults meanwhile; the event is set when they are over. Leaving ends them, and waits for that."""
    stopping, over, faults = threading.Event(), asyncio.Event(), schedule(wish)
    if not faults:
        over.set()

    async def inject() -> None:
        try:
            await asyncio.to_thread(injector.run, faults, stopping)
        finally:
            over.set()

    injecting = asyncio.create_task(inject())
    try:
        yield over
    finally:
        stopping.set()
        await injecting


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _mix(plan: ChaosPlan, grpc: str) -> tuple[Mix, str]:
    """The requests' mix, and the model's name."""
    async with AsyncClient(grpc) as client:
        cards = {card.name: card for card in await client.list_models(timeout_s=30)}
        if plan.model is None and len(cards) > 1:
            raise InvalidInput(f"--model: must be given; served are {', '.join(map(repr, sorted(cards)))}")
        name = plan.model or next(iter(cards))
        if name not in cards:
            raise InvalidInput(f"--model: {name!r} is not served; served are {', '.join(map(repr, sorted(cards)))}")
        (count,) = await client.count_tokens(name, [" ".join(WORDS)], timeout_s=30)
    mix = Mix(
        seed=plan.faults.seed,
        count=plan.streams,
        ingresses=plan.ingresses,
        prompt_tokens=plan.prompt_tokens,
        output_tokens=plan.output_tokens,
        tokens_a_word=count / len(WORDS),
        features=plan.features,
    )
    # A chat's template, a number and words that are longer than others come on top.
    longest = round(mix.prompt_tokens[1] * 1.5) + 64 + mix.output_tokens[1]
    if longest > cards[name].max_model_len:
        raise InvalidInput(
            f"--prompt-tokens, --output-tokens: up to {longest} tokens with template; {name!r} takes"
            f" {cards[name].max_model_len}"
        )
    return mix, name
