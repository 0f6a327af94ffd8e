"""A gateway from its settings to its first replica, and to its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray.actor import ActorHandle
from vllm.config import VllmConfig

from hycluster.engine.arguments import model_files
from hycluster.engine.parsers import with_parsers
from hycluster.engine.vllm import engine_config
from hycluster.errors import Unavailable
from hycluster.gateway.gateway import Gateway
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model


@contextlib.asynccontextmanager
async def open_gateway(
    model: Model,
    directory: ActorHandle[Any],
    *,
    router: Router,
    admission: Admission,
    wait_s: float | None,
    metrics: bool = False,
    patient: bool = False,
) -> AsyncIterator[Gateway]:
    """A gateway that follows the directory.

    Args:
        wait_s: wait until a replica can serve, or the pool is known to sleep; None: not at all.

    Raises:
        Unavailable: there is none after ``wait_s`` seconds.
    """
    model, config = await asyncio.to_thread(_configured, model)
    gateway = Gateway(model, config, router, admission, metrics=metrics, patient=patient)
    follower = asyncio.create_task(gateway.follow(directory))
    try:
        if wait_s is not None:
            await until_one_can_serve([gateway], wait_s)
        yield gateway
    finally:
        follower.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await follower
        if gateway.output_handler is not None:
            gateway.output_handler.cancel()
        await gateway.engine_core.close()
        await asyncio.to_thread(gateway.grammars.close)
        gateway.renderer.shutdown()


def _configured(model: Model) -> tuple[Model, VllmConfig]:
    path = model_files(model)
    model = with_parsers(model, path)
    return model, engine_config(model, path)


async def until_one_can_serve(gateways: Sequence[Gateway], wait_s: float | None) -> None:
    """Wait until one of the models can be served, and what can be of the others too: a model's start is its own affair.

    Raises:
        Unavailable: there is none after ``wait_s`` seconds; None waits for ever.
    """
    wanted = [gateway for gateway in gateways if gateway.model_config.runner_type != "generate"]
    for gateway in wanted:
        # It may sleep, and has to tell what it can do; see ``learn``.
        gateway.cold_start.want()
    try:
        async with asyncio.timeout(wait_s):
            while not (any(g.can_open for g in gateways) and all(g.settled for g in gateways)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    except TimeoutError:
        names = ", ".join(repr(gateway.model.name) for gateway in gateways)
        why = "".join(f"; {g.cold_start.trouble.told()}" for g in gateways if g.cold_start.trouble)
        raise Unavailable(f"model: no replica of {names} could serve within {wait_s:.0f} s{why}") from None
    for gateway in gateways:
        if gateway.engine_core.infos:
            gateway.learn()
