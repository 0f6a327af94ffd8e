"""The real engine: vLLM's engine core in the replica's own process, without its sockets.

Pinned to vLLM 0.32.0. This file and ``hycluster/gateway.py`` are all of hycluster that reaches into
vLLM's internals; ``tests/integration/test_vllm_contract.py`` says what they rely on. Here that is:

- ``EngineCoreProc`` gets its addresses from ``_perform_handshakes`` and does all socket work in
  ``process_input_sockets`` and ``process_output_sockets`` (vLLM's own Ray actors replace the first one
  too); its loop reads ``input_queue`` and ``aborts_queue`` and fills ``output_queue`` with
  ``(client index, EngineCoreOutputs)``, one a step and client.
- On CPU ``create_engine_config`` turns the ``uni`` executor into ``mp``, whose workers wait by spinning.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType, FinishReason
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.executor import Executor
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from hycluster.config import Model
from hycluster.core import ReplicaLoad
from hycluster.engine.arguments import engine_arguments
from hycluster.engine.protocol import EngineInfo, Frame
from hycluster.errors import EngineStartFailed, SettingsError

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = 16


def engine_config(model: Model, model_path: str) -> VllmConfig:
    """vLLM's configuration for a model of the settings.

    Raises:
        SettingsError: vLLM refuses an argument or the model; the message is vLLM's.
    """
    arguments = engine_arguments(model, model_path)
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in arguments.keys() - known:
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SettingsError(f"models: {model.name}: engine.{name}: vLLM's engine has no such argument{hint}")
    try:
        config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise SettingsError(f"models: {model.name}: {_first_lines(error)}") from error
    if config.parallel_config.world_size == 1:
        config.parallel_config.distributed_executor_backend = "uni"
    return config


class VllmEngine:
    """A started vLLM engine. Implements :class:`hycluster.engine.protocol.Engine`.

    The engine is built and stepped on a thread of its own: what torch keeps by thread then belongs to
    the thread that runs the model.

    Raises:
        SettingsError: the settings or the model folder are wrong.
        EngineStartFailed: the engine could not start, for instance for want of memory.
    """

    def __init__(self, model: Model, model_path: str) -> None:
        config = engine_config(model, model_path)
        started: Future[_EngineCore] = Future()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(config, started), name="engine", daemon=True)
        self._thread.start()
        try:
            self._core = started.result()
        except SettingsError:
            raise
        except Exception as error:
            raise EngineStartFailed(f"models: {model.name}: the engine did not start: {_first_lines(error)}") from error
        self._requests = MsgpackDecoder(EngineCoreRequest)
        self._outputs = MsgpackEncoder()
        cache = config.cache_config
        self.info = EngineInfo(
            max_model_len=config.model_config.max_model_len,
            kv_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
            block_size=cache.block_size,
            supported_tasks=tuple(self._core.get_supported_tasks()),
        )
        if "generate" in self.info.supported_tasks:
            self._warm_up(model)

    def _warm_up(self, model: Model) -> None:
        """Serve one short request: an engine that has started is one that has generated.

        It also takes the first request's dear set-up (lazily made kernels, thread pools) off a caller's hands.
        """
        tokens = [i % self._core.vllm_config.model_config.get_vocab_size() for i in range(WARM_UP_TOKENS)]
        request = EngineCoreRequest(
            request_id="warm-up",
            prompt_token_ids=tokens,
            mm_features=None,
            sampling_params=SamplingParams(max_tokens=2, temperature=0, ignore_eos=True),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self.add(0, cast("Sequence[Frame]", self._outputs.encode(request)))
        outputs = MsgpackDecoder(EngineCoreOutputs)
        while (message := self.next_output()) is not None:
            for output in outputs.decode(message[1]).outputs:
                if output.finish_reason is FinishReason.LENGTH:
                    return
                if output.finish_reason is not None:
                    raise EngineStartFailed(f"models: {model.name}: the engine's first request failed; see its log")
        raise EngineStartFailed(f"models: {model.name}: the engine died at its first request: {self._error}")

    def _run(self, config: VllmConfig, started: Future[_EngineCore]) -> None:
        try:
            core = _EngineCore(config)
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
        self._core.input_queue.put_nowait((EngineCoreRequestType.ADD, prepared))

    def abort(self, client: int, request_ids: list[str]) -> None:
        # In both queues, as vLLM does: the first one takes effect within the running step, the second
        # keeps the order for a request that has not been read yet.
        self._core.aborts_queue.put_nowait(request_ids)
        self._core.input_queue.put_nowait((EngineCoreRequestType.ABORT, request_ids))

    def abort_client(self, client: int) -> None:
        self.call(client, 0, "abort_client", [client])

    def call(self, client: int, call_id: int, method: str, args: Sequence[Any]) -> None:
        self._core.input_queue.put_nowait((EngineCoreRequestType.UTILITY, (client, call_id, method, tuple(args))))

    def next_output(self) -> tuple[int, Sequence[Frame]] | None:
        item = self._core.output_queue.get()
        if isinstance(item, bytes):
            return None
        client, outputs = item
        return client, cast("Sequence[Frame]", self._outputs.encode(outputs))

    def load(self) -> ReplicaLoad:
        running, waiting = self._core.scheduler.get_request_counts()
        return ReplicaLoad(running=running, waiting=waiting, kv_usage=self._core.scheduler.get_kv_cache_usage())

    @property
    def error(self) -> BaseException | None:
        return self._error

    @property
    def last_step_age_s(self) -> float | None:
        return time.monotonic() - self._core.stepped_at if self._core.has_work() else None

    def shutdown(self) -> None:
        if self._thread.is_alive():
            self._core.shutdown_state = EngineShutdownState.REQUESTED
            self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
            self._thread.join()


class _EngineCore(EngineCoreProc):
    """vLLM's engine core with queues where its sockets would be."""

    def __init__(self, config: VllmConfig) -> None:
        self.stepped_at = time.monotonic()
        super().__init__(
            config,
            local_client=True,
            handshake_address="",
            executor_class=Executor.get_class(config),
            log_stats=True,
        )

    @contextmanager
    def _perform_handshakes(self, *_: Any, **__: Any) -> Generator[EngineZmqAddresses, None, None]:
        yield EngineZmqAddresses(inputs=[], outputs=[])

    def process_input_sockets(self, *_: Any) -> None:
        ready_event: threading.Event = _[-1]
        ready_event.set()

    def process_output_sockets(self, *_: Any) -> None:
        """Nothing to do: ``VllmEngine.next_output`` empties the output queue."""

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
        requests = cast(Scheduler, self.scheduler).requests.values()
        gone = [request.request_id for request in requests if request.client_index == client]
        self.abort_requests(gone)


def _first_lines(error: BaseException, limit: int = 600) -> str:
    """vLLM's and pydantic's messages run over many lines; one line is enough to act on."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
