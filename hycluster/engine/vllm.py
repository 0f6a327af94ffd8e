"""The real engine: vLLM's engine core in the replica's own process, without its sockets.

Pinned to vLLM 0.32.0, into whose internals it reaches (``docs/reaches.md`` lists the files that do);
``tests/integration/test_vllm_contract.py`` says what they rely on. Here that is:

- ``EngineCoreProc`` gets its addresses from ``_perform_handshakes`` and does all socket work in
  ``process_input_sockets`` and ``process_output_sockets`` (vLLM's own Ray actors replace the first one
  too); its loop reads ``input_queue`` and ``aborts_queue`` and fills ``output_queue`` with
  ``(client index, EngineCoreOutputs)``, one a step and client.
- The ranks of a data-parallel group step together while one of them has work. ``DPEngineCoreProc`` asks for
  a start, by ``start_wave`` to client -1, when it gets a request for a wave that is over, and is told of one by
  ``START_DP_WAVE``. vLLM has a process in between, the coordinator; here the ranks tell each other, and with it what
  work they have (:mod:`hycluster.engine.rank_work`).
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, cast

import msgspec
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType, FinishReason
from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc, EngineShutdownState
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.executor import Executor
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from hycluster.adapters import adapter_id
from hycluster.core import Priority, ReplicaLoad
from hycluster.engine.arguments import check_platform, engine_arguments
from hycluster.engine.cached_blocks import BlockTeller, ToldBlocks, block_naming
from hycluster.engine.expert_load import expert_load_meter
from hycluster.engine.loaded_weights import routed_weights, worker_weights
from hycluster.engine.migrated import take_over, tokens_of
from hycluster.engine.model_checks import check_experts, check_media
from hycluster.engine.parsers import with_parsers
from hycluster.engine.patches.cpu_executor import patch_executor
from hycluster.engine.patches.grammar_backends import patch_backends
from hycluster.engine.patches.grammar_errors import patch_reasons
from hycluster.engine.patches.migrated_grammar import patch_grammars
from hycluster.engine.patches.migrated_state import patch_states
from hycluster.engine.protocol import NOBODY, SIBLINGS, EngineInfo, Frame, GroupRank
from hycluster.engine.rank_work import RankWork, Siblings
from hycluster.engine.scheduler import ColocationScheduler, colocation_load, use_colocation, why_not_colocated
from hycluster.engine.scratch import Scratch
from hycluster.engine.step_time import StepTime
from hycluster.engine.vllm_metrics import SchedulerMetrics
from hycluster.engine.waiting import take_payer
from hycluster.errors import EngineStartFailed, SettingsError
from hycluster.models.routing import layer_counts
from hycluster.settings.model import Adapter, Model

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = 16
# Older than any wave.
PAST_WAVE = -1


def engine_config(model: Model, model_path: str, place: GroupRank | None = None) -> VllmConfig:
    """vLLM's configuration for a model of the settings.

    Args:
        place: where in its data-parallel group the engine stands; None for one that runs by itself, or a gateway.

    Raises:
        SettingsError: vLLM refuses an argument or the model; the message is vLLM's.
    """
    check_platform(model, None)
    model = with_parsers(model, model_path)
    arguments = engine_arguments(model, model_path, place)
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in arguments.keys() - known:
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SettingsError(f"models: {model.name}: engine.{name}: vLLM's engine has no such argument{hint}")
    try:
        engine = AsyncEngineArgs(**arguments)
        if place is not None or model.parallel.expert:
            check_experts(model, engine.create_model_config())
        config = engine.create_engine_config(UsageContext.ENGINE_CONTEXT)
    except SettingsError:
        raise
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise SettingsError(f"models: {model.name}: {_first_lines(error)}") from error
    check_platform(model, config.model_config.quantization)
    check_media(model.name, config.model_config)
    use_colocation(config, model.colocation)
    parallel = config.parallel_config
    patch_executor(parallel)
    if place is not None:
        # Ray, or the process' environment, shows each rank its own devices only.
        parallel.data_parallel_rank_local = 0
        # Ports are agreed upon over this store; those that vLLM has drawn in this process no other rank knows.
        parallel._coord_store_port = place.port
    return config


class _Told(msgspec.Struct, array_like=True):
    """From one rank of a data-parallel group to another: a wave that begins, or what it computes now."""

    rank: int
    wave: int | None = None
    work: RankWork | None = None


class VllmEngine:
    """A started vLLM engine. Implements :class:`hycluster.engine.protocol.Engine`.

    The engine is built and stepped on a thread of its own: what torch keeps by thread then belongs to
    the thread that runs the model.

    Raises:
        SettingsError: the settings or the model folder are wrong.
        EngineStartFailed: the engine could not start, for instance for want of memory.
    """

    def __init__(self, model: Model, model_path: str, place: GroupRank | None = None) -> None:
        config = engine_config(model, model_path, place)
        if model.colocation.enabled and not issubclass(
            config.scheduler_config.get_scheduler_cls(), ColocationScheduler
        ):
            logger.warning(
                "models: %s: colocation is not possible: %s; online callers wait for batch requests",
                model.name, why_not_colocated(config),
            )  # fmt: skip
        self._scratch = Scratch()
        started: Future[_EngineCore] = Future()
        self._error: BaseException | None = None
        self._asked_at = time.monotonic()
        self._probes = 0
        self._thread = threading.Thread(target=self._run, args=(config, started), name="engine", daemon=True)
        self._thread.start()
        try:
            self._core = started.result()
        except SettingsError:
            self._scratch.remove()
            raise
        except Exception as error:
            self._scratch.remove()
            raise EngineStartFailed(f"models: {model.name}: the engine did not start: {_first_lines(error)}") from error
        self._requests = MsgpackDecoder(EngineCoreRequest)
        self._outputs = MsgpackEncoder()
        self._metrics = SchedulerMetrics(config)
        # By client, what it is to hear of KV blocks with its next message.
        self._untold: dict[int, list[Frame]] = {}
        self._sleep_level = 0
        cache = config.cache_config
        self._most_running = config.scheduler_config.max_num_seqs
        self.info = EngineInfo(
            max_model_len=config.model_config.max_model_len,
            kv_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
            block_size=cache.block_size,
            supported_tasks=tuple(self._core.get_supported_tasks()),
            blocks=block_naming(self._core.scheduler),
        )
        for adapter in model.adapters:
            self._load_adapter(model, adapter)
        if "generate" in self.info.supported_tasks:
            self._warm_up(model)
        self._read_expert_load()

    def _load_adapter(self, model: Model, adapter: Adapter) -> None:
        """Load one of the settings' adapters; a broken one is found at the start, and not by a caller."""
        request = LoRARequest(adapter.name, adapter_id(adapter.name, adapter.source), adapter.source)
        self.call(0, 0, "add_lora", [request])
        message = self.next_output()
        answer = MsgpackDecoder(EngineCoreOutputs).decode(message[1]).utility_output if message else None
        if answer is None:
            raise EngineStartFailed(f"models: {model.name}: the engine died at its first adapter: {self._error}")
        if answer.failure_message is not None:
            raise SettingsError(
                f"models: {model.name}: adapters: {adapter.name}: {' '.join(answer.failure_message.split())}"
            )

    def _warm_up(self, model: Model) -> None:
        """Serve one short request: an engine that has started is one that has generated.

        It also takes the first request's dear set-up (lazily made kernels, thread pools) off a caller's hands.
        """
        self.ask(0, "warm-up", range(WARM_UP_TOKENS), max_tokens=2)
        outputs = MsgpackDecoder(EngineCoreOutputs)
        while (message := self.next_output()) is not None:
            if message[0] == SIBLINGS:
                # The other ranks warm up as well, and need no telling.
                continue
            for output in outputs.decode(message[1]).outputs:
                if output.finish_reason is FinishReason.LENGTH:
                    return
                if output.finish_reason is not None:
                    raise EngineStartFailed(f"models: {model.name}: the engine's first request failed; see its log")
        raise EngineStartFailed(f"models: {model.name}: the engine died at its first request: {self._error}")

    def ask(
        self,
        client: int,
        request_id: str,
        prompt: Iterable[int],
        max_tokens: int,
        priority: Priority = Priority.ONLINE,
    ) -> None:
        """Queue a greedy request that comes from within the process.

        Args:
            prompt: numbers from which token ids are made.
        """
        vocabulary = self._core.vllm_config.model_config.get_vocab_size()
        request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=[number % vocabulary for number in prompt],
            mm_features=None,
            sampling_params=SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            priority=int(priority),
        )
        self.add(client, cast("Sequence[Frame]", MsgpackEncoder().encode(request)))

    def probe(self) -> None:
        # A prompt below a block's size: the prefix cache does not see it.
        if "generate" in self.info.supported_tasks and not self._core.is_sleeping():
            self._probes += 1
            self.ask(NOBODY, f"probe-{self._probes}", range(1), max_tokens=1)

    def _run(self, config: VllmConfig, started: Future[_EngineCore]) -> None:
        try:
            core = _RankCore(config) if config.parallel_config.data_parallel_size > 1 else _EngineCore(config)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(core)
        try:
            core.run_busy_loop()
        except SystemExit:
            logger.info("engine ended")
        except BaseException as error:
            # Whatever it was, the engine is of no more use: say so and let the replica be replaced.
            logger.exception("engine died")
            self._error = error
        finally:
            core.shutdown()  # type: ignore[no-untyped-call]
            core.output_queue.put_nowait(EngineCoreProc.ENGINE_CORE_DEAD)

    def add(self, client: int, frames: Sequence[Frame]) -> None:
        request: EngineCoreRequest = self._requests.decode(frames)
        request.client_index = client
        try:
            prepared = self._core.preprocess_add_request(request)
        except Exception:
            # As vLLM's own input thread does: the request is answered with an error, the engine goes on.
            logger.exception("request %s could not be prepared", request.request_id)
            self._core._send_error_outputs_to_client([request.request_id], client)
            return
        take_over(prepared[0])
        take_payer(prepared[0])
        if self._core.siblings and request.priority < Priority.BATCH:
            self._core.siblings.tell_arrival()
        self._queue(EngineCoreRequestType.ADD, prepared)

    def abort(self, client: int, request_ids: list[str]) -> None:
        # In both queues, as vLLM does: the first one takes effect within the running step, the second
        # keeps the order for a request that has not been read yet.
        self._core.aborts_queue.put_nowait(request_ids)
        self._queue(EngineCoreRequestType.ABORT, request_ids)

    def abort_client(self, client: int) -> None:
        self.call(client, 0, "abort_client", [client])

    def call(self, client: int, call_id: int, method: str, args: Sequence[Any]) -> None:
        if method == "sleep":
            self._sleep_level = int(args[0]) if args else 1
        self._queue(EngineCoreRequestType.UTILITY, (client, call_id, method, tuple(args)))

    def _queue(self, kind: EngineCoreRequestType, what: Any) -> None:
        if self.last_step_age_s is None:
            self._asked_at = time.monotonic()
        self._core.input_queue.put_nowait((kind, what))

    def follow_blocks(self, client: int) -> None:
        self.call(NOBODY, 0, "follow_blocks", [client])

    def next_output(self) -> tuple[int, Sequence[Frame]] | None:
        while True:
            if self._untold and self._core.output_queue.empty():
                # The step had nothing else for it.
                return self._untold.popitem()
            item = self._core.output_queue.get()
            if isinstance(item, bytes):
                return None
            if isinstance(item, ToldBlocks):
                for follower in item.followers:
                    self._untold.setdefault(follower, []).append(item.frame)
                continue
            client, outputs = item
            if client == SIBLINGS:
                return SIBLINGS, [msgspec.msgpack.encode(outputs)]
            if outputs.scheduler_stats is not None:
                # Here, where all of them come by; whom they are sent to may be anybody.
                self._metrics.record(outputs.scheduler_stats)
            if client != NOBODY:
                return client, [*self._untold.pop(client, ()), *self._outputs.encode(outputs)]
            if outputs.start_wave is not None:
                return SIBLINGS, [msgspec.msgpack.encode(_Told(self._core.engine_index, wave=outputs.start_wave))]

    def hear(self, frames: Sequence[Frame]) -> None:
        told = msgspec.msgpack.decode(frames[0], type=_Told)
        if told.wave is not None:
            self._queue(EngineCoreRequestType.START_DP_WAVE, (told.wave, told.rank))
        if told.work is not None:
            self._core.siblings.hear(told.rank, told.work)

    def load(self) -> ReplicaLoad:
        scheduler = cast(Scheduler, self._core.scheduler)
        running, waiting = scheduler.get_request_counts()
        kv_usage = scheduler.get_kv_cache_usage()
        self._read_expert_load()
        return ReplicaLoad(
            running=running,
            waiting=waiting,
            most_running=self._most_running,
            kv_usage=kv_usage,
            experts=self._core.experts.load if self._core.experts is not None else None,
            colocation=colocation_load(scheduler),
            samples=self._metrics.samples(
                running=running,
                waiting=waiting,
                deferred=len(scheduler.deferred_waiting),
                kv_usage=kv_usage,
                sleep_level=self._sleep_level if self._core.model_executor.is_sleeping else 0,
                requests=list(scheduler.requests.values()),
            ),
        )

    def _read_expert_load(self) -> None:
        """Have the engine's thread read it between two steps, now and then; the answer is for no client."""
        if self._core.experts is not None and self._core.experts.due():
            self.call(NOBODY, 0, "read_expert_load", [])

    @property
    def error(self) -> BaseException | None:
        return self._error

    @property
    def last_step_age_s(self) -> float | None:
        # Of its own work: a rank without any steps along with those that have some.
        core = self._core
        busy = core.scheduler.has_requests() or bool(core.batch_queue) or not core.input_queue.empty()
        # What an idle engine has been asked for is as old as the question; the engine may be stuck without a step.
        return time.monotonic() - max(core.stepped_at, self._asked_at) if busy else None

    def shutdown(self) -> None:
        if self._thread.is_alive():
            self._core.shutdown_state = EngineShutdownState.REQUESTED
            self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
            self._thread.join()
            self._scratch.remove()


class _EngineCore(BlockTeller):
    """vLLM's engine core with queues where its sockets would be."""

    def __init__(self, config: VllmConfig) -> None:
        self.stepped_at = time.monotonic()
        self.siblings = Siblings()
        super().__init__(
            config,
            local_client=True,
            handshake_address="",
            executor_class=Executor.get_class(config),
            log_stats=True,
        )
        patch_backends(self.structured_output_manager)
        patch_reasons(self.scheduler)
        patch_grammars(self.structured_output_manager, tokens_of, take_over)
        if not config.use_v2_model_runner:
            self.model_executor.collective_rpc(patch_states, args=(tokens_of,))
        if current_platform.is_cpu():
            from hycluster.engine.patches.cpu_logprobs import patch_logprobs
            from hycluster.engine.patches.cpu_seed import patch_seeds

            for patch in (patch_seeds, patch_logprobs):
                self.model_executor.collective_rpc(patch)
        self.experts = expert_load_meter(config, self.model_executor)
        if isinstance(self.scheduler, ColocationScheduler):
            self.scheduler.step_time = StepTime(routed_weights(self.model_executor.collective_rpc(worker_weights)))

    @contextmanager
    def _perform_handshakes(self, *_: Any, **__: Any) -> Generator[EngineZmqAddresses, None, None]:
        yield EngineZmqAddresses(inputs=[], outputs=[])

    def process_input_sockets(self, *_: Any) -> None:
        ready_event: threading.Event = _[-1]
        ready_event.set()

    def process_output_sockets(self, *_: Any) -> None:
        """Nothing to do: ``VllmEngine.next_output`` empties the output queue."""

    def read_expert_load(self) -> None:
        """Called in the engine's own thread."""
        if self.experts is not None:
            self.experts.take(self.model_executor.collective_rpc(layer_counts))

    def _process_input_queue(self) -> None:
        idle = not self.has_work()
        super()._process_input_queue()  # type: ignore[no-untyped-call]
        if idle:
            # Time spent waiting for work is not the age of a step.
            self.stepped_at = time.monotonic()

    def _process_engine_step(self) -> bool:
        executed = super()._process_engine_step()
        self.stepped_at = time.monotonic()
        return executed

    def abort_client(self, client: int) -> None:
        """Drop every request of a client; called in the engine's own thread, after what it sent before."""
        self.leave_blocks(client)
        requests = cast(Scheduler, self.scheduler).requests.values()
        gone = [request.request_id for request in requests if request.client_index == client]
        self.abort_requests(gone)


class _RankCore(_EngineCore, DPEngineCoreProc):
    """The same for a rank of a data-parallel group."""

    @contextmanager
    def _perform_handshakes(self, *_: Any, **__: Any) -> Generator[EngineZmqAddresses, None, None]:
        # That there is an address of a coordinator makes the rank ask for waves to be started.
        yield EngineZmqAddresses(inputs=[], outputs=[], coordinator_input="", coordinator_output="")

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        if isinstance(self.scheduler, ColocationScheduler):
            self.siblings = self.scheduler.siblings
            self.siblings.send = self._tell

    def _tell(self, work: RankWork) -> None:
        self.output_queue.put_nowait((SIBLINGS, _Told(self.engine_index, work=work)))  # type: ignore[arg-type]

    def _process_engine_step(self) -> bool:
        executed = super()._process_engine_step()
        if not self.scheduler.has_requests():
            # The scheduler, which says what it has, is not asked then.
            self.siblings.tell(RankWork())
        return executed

    def add_request(self, request: Request, request_wave: int = 0) -> None:
        # Gateways do not keep count of waves. To one that is over, an idle rank says that it starts the next.
        super().add_request(request, PAST_WAVE)


def _first_lines(error: BaseException, limit: int = 600) -> str:
    """vLLM's and pydantic's messages run over many lines; one line is enough to act on."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
