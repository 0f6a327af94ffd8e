"""Where a gateway's requests meet the limits of their callers: what they may use, and what they have used."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM

from hycluster.auth.caller import current_caller
from hycluster.core import GenerationRequest
from hycluster.errors import Overloaded, Unavailable
from hycluster.limits.limiter import Limiter
from hycluster.limits.reservation import RequestTokens, Reservation, current_reservation
from hycluster.observe.limits import LimitMetrics  # noqa: F401  # registers itself
from hycluster.settings.model import Model

# Of a prompt that is not yet tokens: how long one is.
BYTES_PER_TOKEN = 4


class LimitedGateway(Protocol):
    """What is asked of a gateway here."""

    model: Model
    model_config: Any


def expected_output_tokens(gateway: LimitedGateway, asked_for: int | None, n: int = 1) -> int:
    """What is reserved for the answer: as much as the request allows, or what the model's settings expect."""
    most: int = gateway.model_config.max_model_len
    return n * min(asked_for or gateway.model.autoscaling.expected_output_tokens, most)


@contextlib.asynccontextmanager
async def limited(
    limiter: Limiter, gateway: LimitedGateway, request: GenerationRequest
) -> AsyncIterator[Reservation | None]:
    """Around a request that comes by gRPC; gives what it has reserved, for which its model is to be asked.

    Raises:
        RateLimited, QuotaExhausted: its caller has no room for it.
        Unavailable: that can't be told now.
    """
    met = limiter.concerning(current_caller.get(), request.model)
    if not met:
        yield None
        return
    output = expected_output_tokens(gateway, request.sampling.max_tokens, request.sampling.n)
    reservation = await limiter.reserve(met, RequestTokens(_prompt_tokens(request), 0, output), gateway.model.price)
    counts = True
    try:
        yield reservation
    except (Overloaded, Unavailable):
        counts = False
        raise
    finally:
        reservation.end(counts=counts)


def _prompt_tokens(request: GenerationRequest) -> int:
    if request.token_ids is not None:
        return len(request.token_ids)
    return len((request.prompt or str(request.messages)).encode()) // BYTES_PER_TOKEN + 1


class MeteredLLM(AsyncLLM):
    """Tells the reservation of a request, if it has one, what is used."""

    def generate(self, *asked: Any, **named: Any) -> Any:
        """As ``AsyncLLM`` does it."""
        return _metered(super().generate(*asked, **named))

    def encode(self, *asked: Any, **named: Any) -> Any:
        """As ``AsyncLLM`` does it."""
        return _metered(super().encode(*asked, **named))


def _metered(outputs: Any) -> Any:
    reservation = current_reservation.get()
    return outputs if reservation is None else metered(outputs, reservation)


async def metered(outputs: AsyncGenerator[Any, None], reservation: Reservation) -> AsyncGenerator[Any, None]:
    """The outputs of one prompt, counted."""
    prompt = cached = completion = 0
    told = False
    with reservation.asking():
        try:
            async with contextlib.aclosing(outputs):
                # For each token of each stream.
                async for output in outputs:
                    told = reservation.began = True
                    prompt = prompt or len(output.prompt_token_ids or ())
                    cached = output.num_cached_tokens or cached
                    if isinstance(output, RequestOutput):
                        for sequence in output.outputs:
                            completion += len(sequence.token_ids)
                    yield output
        except (asyncio.CancelledError, GeneratorExit):
            if not told:
                # Its caller has left.
                reservation.give_up()
            raise
        finally:
            reservation.add(RequestTokens(prompt, min(cached, prompt), completion))
