"""A request in the house's own words, carried out by the gateway of its model.

The gRPC ingress and batch jobs come through here; the HTTP ingress is vLLM's own app over the same gateways.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import secrets
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Container, Iterator, Mapping, Sequence
from typing import Any, Unpack

from ray.actor import ActorHandle
from tokenizers import Tokenizer
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMNotFoundError, VLLMValidationError
from vllm.inputs import EngineInput, split_enc_dec_input
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers import TokenizerLike
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from hycluster.adapters import check_name, public_name
from hycluster.auth.caller import Caller, usable
from hycluster.core import Generation, GenerationRequest, ModelCard, Priority, PromptFields, Sampling
from hycluster.directory.directory import find_directory
from hycluster.errors import (
    DeadlineExceeded,
    HyclusterError,
    InvalidInput,
    PromptTooLong,
    RequestFailed,
    Unavailable,
    UnknownModel,
    one_line,
    shown,
)
from hycluster.gateway.admission import check_id
from hycluster.gateway.bulk import FIXED_ROWS, BulkLane
from hycluster.gateway.chat import ModelChat, Turn, structured_outputs
from hycluster.gateway.gateway import Gateway
from hycluster.gateway.limited import limited
from hycluster.gateway.opening import open_gateway, until_one_can_serve
from hycluster.gateway.outputs import lengths_of, output_of, usage_of
from hycluster.limits.limiter import Limiter
from hycluster.limits.reservation import Reservation, reserving
from hycluster.observe.timelines import Carried
from hycluster.pool_health import PoolHealth, able
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.timeline import current

# What vLLM's renderer names as wrong where a prompt is too long, counted in characters or in tokens.
LENGTH_PARAMETERS = ("input_text", "input_tokens")


class Generator:
    """All models of a cluster behind one interface; see :func:`open_generator`.

    Attributes:
        limiter: of this process; None where nobody has limits.
        adapter_folder: below which projects have their adapters; None: they load none.
    """

    def __init__(self, gateways: Mapping[str, Gateway]) -> None:
        self.gateways = dict(gateways)
        self._counters: dict[str, Callable[[Sequence[str]], list[int]]] = {}
        self._chats: dict[str, ModelChat] = {}
        self.limiter: Limiter | None = None
        self.adapter_folder: str | None = None

    async def models(self) -> list[ModelCard]:
        """What is served, adapters after their model, and by how many replicas now."""
        return [
            ModelCard(name, gateway.model_config.max_model_len, gateway.engine_core.links)
            for model, gateway in self.gateways.items()
            for name in (model, *gateway.lora_requests)
        ]

    @property
    def served(self) -> list[str]:
        """All names that a request may have: the models', and after each of them its adapters'."""
        return [name for model, gateway in self.gateways.items() for name in (model, *gateway.lora_requests)]

    def model_of(self, name: str) -> str | None:
        """The model that a name stands for: its own, or one of its adapters'; None if nothing has that name."""
        if name in self.gateways:
            return name
        return next((model for model, gateway in self.gateways.items() if name in gateway.lora_requests), None)

    async def load_adapter(self, name: str, source: str, *, model: str | None = None, replace: bool = False) -> None:
        """Serve a LoRA adapter from now on, at all ingress processes and by all replicas of its model.

        Args:
            name: in full, if it is a project's (:mod:`hycluster.adapters`).
            source: a folder in PEFT's format that every node sees, or a hub id.
            model: whose adapter it is; needs not be said where only one model takes adapters.
            replace: let a name that is in use go over to another source.

        Raises:
            InvalidInput: names the field and what is allowed; then nothing has changed.
            UnknownModel: there is no such model.
            Unavailable: no replica can serve, or one did not answer.
        """
        check_name(name, source)
        if public_name(name) in self.gateways:
            raise InvalidInput(f"lora_name: {shown(name)} is the name of a model")
        takers = [taker for taker, each in self.gateways.items() if each.vllm_config.lora_config is not None]
        if model is None:
            if len(takers) > 1:
                raise InvalidInput(f"model: must be one of {', '.join(map(repr, takers))}")
            model = next(iter(takers or self.gateways))
        holder, gateway = self._holder(name), self._gateway(model)[0]
        if holder is not None:
            called = shown(public_name(name))
            if not replace or holder != model:
                raise InvalidInput(f"lora_name: {called} is an adapter of {holder!r} already")
            if gateway.adapters.source_of(name) == source:
                why = "is loaded from there already; changed weights need a path of their own"
                raise InvalidInput(f"lora_path: {called} {why}")
        await gateway.adapters.load(name, source)

    async def unload_adapter(self, name: str) -> None:
        """Serve a LoRA adapter no more, a project's by its name in full; requests that run go on.

        Raises:
            UnknownModel: there is no such adapter.
        """
        if (model := self._holder(name)) is None:
            known = (adapter for each in self.gateways.values() for adapter in each.lora_requests)
            raise UnknownModel(public_name(name), usable(known))
        await self.gateways[model].adapters.unload(name)

    def _holder(self, adapter: str) -> str | None:
        """The model that has the adapter of this name, in full."""
        return next((m for m, each in self.gateways.items() if each.adapters.source_of(adapter) is not None), None)

    async def end(self, error: HyclusterError, of: Container[Caller] | None = None) -> None:
        """End what is in flight for these callers, at either ingress, with an error; None: all that is."""
        for gateway in self.gateways.values():
            await gateway.end_requests(error, of)

    @property
    def callers(self) -> set[Caller]:
        """For whom something is in flight, where they are asked who they are."""
        return {caller for gateway in self.gateways.values() for caller in gateway.callers}

    async def ready(self) -> bool:
        """Whether callers are to come here; see :func:`hycluster.pool_health.able`."""
        return able(await self.pools())

    async def pools(self) -> dict[str, PoolHealth]:
        """How many replicas of each model take requests from here. A group counts once one of its ranks does."""
        return {name: gateway.health for name, gateway in self.gateways.items()}

    async def tokenize(self, model: str, **asked: Unpack[PromptFields]) -> list[int]:
        """Token ids of a prompt, or of messages under the model's chat template."""
        gateway, _ = self._gateway(model)
        with _translated_errors():
            request = GenerationRequest(model=model, **asked)
            engine_input, _ = await self._render(gateway, request)
        return _prompt_ids(engine_input)

    def token_counter(self, model: str) -> Callable[[Sequence[str]], list[int]]:
        """Counts the tokens of many texts, special ones aside; may be called from any thread."""
        name = self.model_of(model) or model
        if name not in self._counters:
            self._counters[name] = token_counter(self._gateway(name)[0].renderer.get_tokenizer())
        return self._counters[name]

    def lane(self, model: str, job: str, most: int | None = None, fixed: int = FIXED_ROWS) -> BulkLane:
        """The places of one job in the engines of a model; see :class:`hycluster.gateway.bulk.BulkLanes`.

        Raises:
            UnknownModel
        """
        return self._gateway(model)[0].bulk.lane(job, most, fixed)

    async def count_tokens(self, model: str, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, special ones aside. Streams go on meanwhile: a thread counts.

        Raises:
            UnknownModel
        """
        return await asyncio.to_thread(self.token_counter(model), texts)

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        """The whole answer at once.

        Raises:
            InvalidInput (PromptTooLong), UnknownModel, Overloaded, Unavailable (ReplicaLost, RequestFailed),
            DeadlineExceeded
        """
        last: RequestOutput | None = None
        turn: Turn | None = None
        with Carried(request.request_id or "", "generate", model=request.model):
            async with contextlib.aclosing(self._run(request, RequestOutputKind.FINAL_ONLY, deadline_s)) as outputs:
                async for output, read_by in outputs:
                    last, turn = output, read_by
        if last is None:
            raise Unavailable("the engine ended this request without an output")
        said = [output_of(o) for o in last.outputs]
        if turn is not None:
            said = turn.whole(last, said)
        return Generation(last.request_id, request.model, said, usage_of(last, lengths_of(last)))

    async def stream(
        self, request: GenerationRequest, *, deadline_s: float | None = None
    ) -> AsyncGenerator[Generation, None]:
        """What is new, as it comes; the last one carries the usage. Closing the iterator aborts the request."""
        lengths: dict[int, int] = {}
        async with contextlib.aclosing(self._run(request, RequestOutputKind.DELTA, deadline_s)) as outputs:
            async for delta, turn in outputs:
                for output in delta.outputs:
                    lengths[output.index] = lengths.get(output.index, 0) + len(output.token_ids)
                usage = usage_of(delta, lengths) if delta.finished else None
                said = [output_of(o) for o in delta.outputs]
                if turn is not None:
                    said = turn.deltas(delta, said)
                    if not said and usage is None:
                        continue
                yield Generation(delta.request_id, request.model, said, usage)

    async def _run(
        self, request: GenerationRequest, kind: RequestOutputKind, deadline_s: float | None
    ) -> AsyncGenerator[tuple[RequestOutput, Turn | None], None]:
        gateway, lora_request = self._gateway(request.model)
        deadline = None if deadline_s is None else asyncio.get_running_loop().time() + deadline_s
        async with contextlib.AsyncExitStack() as stack:
            if request.job is not None and request.priority >= Priority.BATCH:
                with _translated_errors():
                    check_id("job", request.job)
                    if (timeline := current.get()) is not None:
                        timeline.note("waiting", reason="a place in the engines")
                    async with asyncio.timeout_at(deadline):
                        await stack.enter_async_context(gateway.bulk.shared_lane(request.job))
            reservation: Reservation | None = None
            if self.limiter is not None:
                async with asyncio.timeout_at(deadline):
                    reservation = await stack.enter_async_context(limited(self.limiter, gateway, request))
            # From here on it is in the ledger; who is over a limit is not.
            gateway.check_admission(request.sampling.n, bulk=request.priority >= Priority.BATCH)
            outputs = self._admitted(gateway, lora_request, request, kind, deadline, reservation)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield output

    async def _admitted(
        self,
        gateway: Gateway,
        lora_request: LoRARequest | None,
        request: GenerationRequest,
        kind: RequestOutputKind,
        deadline: float | None,
        reservation: Reservation | None,
    ) -> AsyncGenerator[tuple[RequestOutput, Turn | None], None]:
        with _translated_errors():
            async with asyncio.timeout_at(deadline):
                engine_input, turn = await self._render(gateway, request)
            room = gateway.model_config.max_model_len - len(_prompt_ids(engine_input))
            # Not around a yield: whoever closes this generator may do so in another context.
            with reserving(reservation):
                outputs = gateway.generate(
                    engine_input,
                    _in_form(sampling_params(gateway, request.sampling, room, kind), request, turn),
                    request.request_id or f"gen-{secrets.token_hex(12)}",
                    lora_request=lora_request,
                    priority=int(request.priority),
                    session_id=request.session_id,
                    **(turn.engine_arguments if turn is not None else {}),
                )
            async with contextlib.aclosing(outputs):
                while True:
                    # Around each step, not around the loop: a deadline must not strike in the caller's code.
                    async with asyncio.timeout_at(deadline):
                        output = await anext(outputs, None)
                    if output is None:
                        return
                    for sequence in output.outputs:
                        # vLLM hands these out as if they were answers.
                        if sequence.finish_reason in ("error", "abort"):
                            kind_of = RequestFailed if sequence.finish_reason == "error" else Unavailable
                            raise kind_of(f"the engine ended this request early ({sequence.finish_reason})")
                    yield output, turn

    def _gateway(self, name: str) -> tuple[Gateway, LoRARequest | None]:
        """The gateway for a name, and the adapter that the name stands for, if it is one's."""
        model = self.model_of(name)
        if model is None:
            raise UnknownModel(name, usable(self.served))
        gateway = self.gateways[model]
        return gateway, gateway.lora_requests.get(name) if name != model else None

    async def _render(self, gateway: Gateway, request: GenerationRequest) -> tuple[EngineInput, Turn | None]:
        """The prompt, and in a chat how the answer is to be read."""
        if request.messages is not None:
            with _blamed_on_the_request():
                turn = await self._chat(gateway).render(request)
            return turn.engine_input, turn
        renderer = gateway.renderer
        prompt, token_ids = request.prompt, request.token_ids
        text_or_ids: Any = {"prompt": prompt} if prompt is not None else {"prompt_token_ids": list(token_ids or ())}
        engine_input: EngineInput
        with _blamed_on_the_request():
            (engine_input,) = await renderer.render_cmpl_async([text_or_ids], renderer.default_cmpl_tok_params)
        return engine_input, None

    def _chat(self, gateway: Gateway) -> ModelChat:
        name = gateway.model.name
        if name not in self._chats:
            self._chats[name] = ModelChat(gateway)
        return self._chats[name]


def token_counter(tokenizer: TokenizerLike) -> Callable[[Sequence[str]], list[int]]:
    """A counter with a tokenizer of its own: a fast one must not be used by two threads at once."""
    lock = threading.Lock()
    fast: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    own: Any = copy.deepcopy(tokenizer if fast is None else fast)
    if fast is not None:
        own.no_truncation()
        own.no_padding()

    def count(texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        with lock:
            if fast is None:
                return [len(ids) for ids in own(list(texts), add_special_tokens=False)["input_ids"]]
            # Past transformers, which would make a Python list of all ids: twice as quick.
            return [len(encoding) for encoding in own.encode_batch_fast(list(texts), add_special_tokens=False)]

    return count


def sampling_params(gateway: Gateway, sampling: Sampling, room: int, kind: RequestOutputKind) -> SamplingParams:
    """vLLM's sampling parameters; what the caller left open is the model's ``generation_config``.

    Args:
        room: tokens that the context leaves after the prompt.

    Raises:
        PromptTooLong: the prompt fills the context.
    """
    limit = gateway.model_config.max_model_len
    if room < 1:
        raise PromptTooLong(
            f"prompt: has {limit - room} tokens, too long for a context of {limit} with room for an output"
        )
    defaults = gateway.model_config.get_diff_sampling_param()
    chosen = {
        name: value
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        if (value := getattr(sampling, name)) is not None or (value := defaults.get(name)) is not None
    }
    return SamplingParams(
        n=sampling.n,
        max_tokens=min(room, sampling.max_tokens or defaults.get("max_tokens") or room),
        min_tokens=sampling.min_tokens,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        output_kind=kind,
        **chosen,
    )


def _in_form(params: SamplingParams, request: GenerationRequest, turn: Turn | None) -> SamplingParams:
    if turn is None:
        params.structured_outputs = structured_outputs(request.structured_output)
    else:
        params.structured_outputs = turn.structured
        params.skip_special_tokens = turn.skip_special_tokens
    return params


@contextlib.contextmanager
def _translated_errors() -> Any:
    """vLLM's errors in the house's words."""
    try:
        yield
    except HyclusterError:
        raise
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before the answer was complete") from None
    except VLLMNotFoundError as error:
        raise InvalidInput(str(error)) from error
    except GracefulHTTPError as error:
        raise Unavailable(str(error)) from error
    except VLLMValidationError as error:
        kind = PromptTooLong if error.parameter in LENGTH_PARAMETERS else InvalidInput
        raise kind(str(error)) from error
    except (EngineGenerateError, EngineDeadError) as error:
        raise Unavailable(f"the engine failed this request: {error.__cause__ or error}") from error
    except (VLLMClientError, ValueError, TypeError) as error:
        raise InvalidInput(str(error)) from error


@contextlib.contextmanager
def _blamed_on_the_request() -> Iterator[None]:
    """Whatever rendering trips over is the request's: a template's, a parser's or a fetched image's error of any kind.

    Nothing of an engine is asked there, so nothing else can be at fault, and asking again would not help.
    """
    try:
        yield
    except (HyclusterError, VLLMClientError, GracefulHTTPError, ValueError, TypeError):
        # Translated with those of the other steps.
        raise
    except Exception as error:
        raise InvalidInput(f"prompt: can't be rendered: {type(error).__name__}: {one_line(error)}") from error


def _prompt_ids(engine_input: EngineInput) -> list[int]:
    """What takes room in the context: the decoder's side, where a model has two."""
    _, decoder_input = split_enc_dec_input(engine_input)
    return list(decoder_input["prompt_token_ids"])


@contextlib.asynccontextmanager
async def open_generator(
    directory: str,
    model: str,
    *,
    router: Router | None = None,
    admission: Admission | None = None,
    wait_s: float = 300.0,
) -> AsyncIterator[Generator]:
    """A generator over one model of a running pool, from any process of the Ray cluster. It wakes one that sleeps.

    Args:
        directory: name of the pool's directory.
        model: name of the model, or of an adapter.

    Raises:
        UnknownModel: the pool has no such model.
        Unavailable: there is no pool, or no replica can serve.
    """
    handle = _directory(directory)
    pool: Model | None = await handle.find.remote(model)
    if pool is None:
        raise UnknownModel(model, sorted(await handle.models.remote()))
    unbounded = Admission(max_requests=None)
    async with open_gateway(
        pool, handle, router=router or Router(), admission=admission or unbounded, wait_s=wait_s, patient=True
    ) as gateway:
        # As in an ingress process: see ``hycluster/door.py``.
        gc.collect()
        gc.freeze()
        yield Generator({pool.name: gateway})


@contextlib.asynccontextmanager
async def open_generators(
    directory: str,
    models: Sequence[Model],
    *,
    router: Router,
    admission: Admission,
    wait_s: float | None,
    metrics: bool = True,
    patient: bool = False,
) -> AsyncIterator[Generator]:
    """A generator over several models, with metrics where an ingress process shows them. Waits until one of them can be
    served.

    Args:
        wait_s: how long; None is for ever.
        patient: see :class:`Gateway`.

    Raises:
        Unavailable: no model could be served.
    """
    handle = _directory(directory)
    async with contextlib.AsyncExitStack() as stack:
        gateways = {
            model.name: await stack.enter_async_context(
                open_gateway(
                    model, handle, router=router, admission=admission, wait_s=None, metrics=metrics, patient=patient
                )
            )
            for model in models
        }
        await until_one_can_serve(list(gateways.values()), wait_s)
        yield Generator(gateways)


def _directory(name: str) -> ActorHandle[Any]:
    try:
        return find_directory(name)
    except ValueError:
        raise Unavailable(f"directory {name!r}: no hycluster is running in this Ray cluster") from None
