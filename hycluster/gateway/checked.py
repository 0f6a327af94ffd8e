"""What is wrong with a request is found before its answer begins.

vLLM checks a request as it sends it. Of a stream that is after its status: whoever asks for what is not allowed hears
200, and of the error only if he reads on. So a gateway checks as soon as it is asked for an answer, which vLLM's
handlers do before they begin one; what that makes of the request is what is sent, so nothing is checked twice.

One check takes time, that of what outputs are to look like (``grammars.py``). A handler that is about to begin a stream
waits for it (``hycluster/engine/patches/early_refusals.py``); all others meet it where the request is sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import msgspec
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import RequestOutputCollector

from hycluster.core import Priority
from hycluster.errors import InvalidInput, Overloaded, Unavailable
from hycluster.gateway.admission import check_id, check_priority, check_sampling
from hycluster.gateway.grammars import GrammarCheck
from hycluster.gateway.limited import MeteredLLM
from hycluster.gateway.places import current_places
from hycluster.gateway.pool import PoolClient
from hycluster.gateway.pool_errors import PoolInvalidInput, PoolOverloaded, PoolUnavailable
from hycluster.gateway.tiers import placed
from hycluster.traffic import GatewayTraffic, TrafficMeter

# What of a request's own is made part of it where it is checked; the rest is added as it is sent.
_CHECKED_WITH = ("lora_request", "data_parallel_rank", "kv_hints")
# Whether a message can hold something is asked before there is a replica to send it to, so not by what sends.
_SENDABLE = msgspec.msgpack.Encoder(enc_hook=lambda _: None)


class CheckedPrompt(dict[str, Any]):
    """A rendered prompt that is allowed as far as can be told at once.

    Attributes:
        request: what it is sent as.
        outputs_checked: also what outputs are to look like.
    """

    request: EngineCoreRequest
    outputs_checked = False


class CheckedInputs(InputProcessor):
    """Makes no second request of a prompt that has one."""

    def process_inputs(self, request_id: str, prompt: Any, *rest: Any, **named: Any) -> EngineCoreRequest:
        if isinstance(prompt, CheckedPrompt):
            return prompt.request
        return super().process_inputs(request_id, prompt, *rest, **named)


_asked: ContextVar[list[CheckedPrompt] | None] = ContextVar("asked", default=None)


class CheckedLLM(MeteredLLM):
    """Checks what it is asked before it gives anything that an answer could begin with.

    Attributes:
        grammars: tries out what outputs are to look like.
        traffic: what callers got.
    """

    engine_core: PoolClient
    grammars: GrammarCheck
    traffic: GatewayTraffic

    def generate(self, prompt: Any, sampling_params: SamplingParams, request_id: str, **named: Any) -> Any:
        """As ``AsyncLLM`` does it, but what can be told at once to be wrong is raised here and not by what it gives.

        Raises:
            PoolInvalidInput, VLLMValidationError: as :meth:`check`.
        """
        prompt = self.check(prompt, sampling_params, request_id, **named)
        return super().generate(prompt, sampling_params, request_id, **named)

    def check(
        self,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        session_id: str | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
        **named: Any,
    ) -> Any:
        """A rendered prompt, checked; to :meth:`generate` with the same arguments. Others are given back as they are.

        Raises:
            PoolInvalidInput: a part of it is larger than its bound, or is not the caller's to set.
            VLLMValidationError: vLLM does not allow it.
        """
        if isinstance(prompt, CheckedPrompt) or not (isinstance(prompt, dict) and "type" in prompt):
            return prompt
        try:
            _check_asked(request_id, params, priority, session_id)
            checked = CheckedPrompt(prompt)
            checked.request = self.input_processor.process_inputs(
                request_id,
                prompt,  # type: ignore[arg-type]
                params,
                self._supported(),
                priority=placed(priority),
                session_id=session_id,
                **{name: named[name] for name in _CHECKED_WITH if name in named},
            )
            _check_sendable(checked.request.sampling_params, reasoning_parser_kwargs)
        except InvalidInput as error:
            raise PoolInvalidInput(error.message) from None
        if (asked := _asked.get()) is not None:
            asked.append(checked)
        return checked

    def _supported(self) -> Any:
        """As ``AsyncLLM`` has it from its engine core."""
        return next((info.supported_tasks for info in self.engine_core.infos), ("generate",))

    @contextlib.contextmanager
    def checking(self) -> Iterator[Callable[[], Awaitable[None]]]:
        """Around what asks for answers; gives what checks the rest of all that was asked.

        That raises PoolInvalidInput, VLLMValidationError, PoolOverloaded or PoolUnavailable.
        """
        prompts: list[CheckedPrompt] = []

        async def check_rest() -> None:
            for prompt in prompts:
                await self._check_outputs_of(prompt)

        before = _asked.set(prompts)
        try:
            yield check_rest
        finally:
            _asked.reset(before)

    async def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams | PoolingParams, *rest: Any, **named: Any
    ) -> RequestOutputCollector:
        """Begin a request that has been admitted.

        Raises:
            PoolInvalidInput: a part of it is larger than its bound, or is not the caller's to set.
        """
        # What the caller said is in its timeline; vLLM would say of it that tracing is off.
        named.pop("trace_headers", None)
        try:
            if isinstance(prompt, CheckedPrompt):
                await self._check_outputs_of(prompt)
            else:
                _check_asked(request_id, params, named.get("priority", 0), named.get("session_id"))
                named["priority"] = placed(named.get("priority", 0))
                if isinstance(params, SamplingParams):
                    await self._check_outputs(params, named["priority"])
            return await super().add_request(request_id, prompt, params, *rest, **named)
        except InvalidInput as error:
            raise PoolInvalidInput(error.message) from None

    async def _check_outputs_of(self, prompt: CheckedPrompt) -> None:
        if not prompt.outputs_checked and prompt.request.sampling_params is not None:
            await self._check_outputs(prompt.request.sampling_params, prompt.request.priority)
            prompt.outputs_checked = True

    async def _check_outputs(self, params: SamplingParams, priority: int) -> None:
        if params.structured_outputs is None:
            return
        traffic = self.traffic.of(bulk=priority >= Priority.BATCH)
        try:
            await self.grammars.check(params.structured_outputs, partial(self._validate_outputs, params))
        except InvalidInput as error:
            raise PoolInvalidInput(error.message) from None
        except Overloaded as shed:
            raise self._refused(PoolOverloaded(shed.message, shed.retry_after_s), traffic, "overloaded") from None
        except Unavailable as error:
            raise self._refused(PoolUnavailable(error.message), traffic, "unavailable") from None

    def _refused(self, error: Any, traffic: TrafficMeter, why: Literal["overloaded", "unavailable"]) -> Any:
        traffic.refuse(why)
        if (places := current_places.get()) is not None:
            places.refusal = error
        return error

    def _validate_outputs(self, params: SamplingParams) -> None:
        """What vLLM does with a request as it takes it; here not in the event loop."""
        params._validate_structured_outputs(
            self.model_config, self.vllm_config.structured_outputs_config, self.input_processor.tokenizer
        )

    def _tokenizer_file(self) -> str | None:
        fast: Any = getattr(self.input_processor.tokenizer, "backend_tokenizer", None)
        return None if fast is None else fast.to_str()


def priority_of(prompt: Any, asked: int) -> int:
    """Where in the engines' queues a request goes that has been taken.

    Args:
        asked: the priority that its caller asked for.
    """
    return prompt.request.priority if isinstance(prompt, CheckedPrompt) else placed(asked)


def _check_asked(request_id: str, params: Any, priority: int, session_id: str | None) -> None:
    check_id("request_id", request_id)
    check_id("session_id", session_id)
    check_priority(priority)
    if isinstance(params, SamplingParams):
        check_sampling(params.extra_args or {}, params.bad_words or ())


def _check_sendable(*said: Any) -> None:
    try:
        _SENDABLE.encode(said)
    except (UnicodeEncodeError, OverflowError) as error:
        # Half of a surrogate pair, a number over 64 bits: JSON can say what no message can hold.
        raise InvalidInput(f"request: holds what can't be sent to an engine: {error}") from None
