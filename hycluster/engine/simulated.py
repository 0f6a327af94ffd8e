"""A simulated engine: the timing model (timing.py) behind the engine protocol.

For tests of control logic and for simulation, in the place of a real engine. It speaks the same
messages, so a gateway cannot tell the two apart but by what the text says.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from hycluster.core import EngineSample, ReplicaLoad
from hycluster.engine import messages
from hycluster.engine.messages import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
    SamplingParams,
)
from hycluster.engine.protocol import NOBODY, EngineInfo, Frame
from hycluster.engine.timing import SimulatedScheduler
from hycluster.errors import InvalidInput
from hycluster.settings.simulated import Simulated

log = logging.getLogger(__name__)


class SimulatedEngine:
    """A thread that steps the timing model; with ``realtime`` each step takes as long as it would."""

    def __init__(self, settings: Simulated, model: str = "simulated") -> None:
        self._labels = (("model_name", model), ("engine", "0"))
        self.info = EngineInfo(
            max_model_len=settings.max_model_len,
            kv_tokens=settings.kv_blocks * settings.block_size_tokens,
            block_size=settings.block_size_tokens,
        )
        self._realtime = settings.realtime
        self._scheduler = SimulatedScheduler(settings)
        self._messages: queue.SimpleQueue[tuple[int, Sequence[Frame]] | None] = queue.SimpleQueue()
        # Guards all below, and the scheduler; told when there may be something to do.
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._ended = False
        self._hanging = False
        self._in_step = False
        self._last_progress = 0.0
        self._thread = threading.Thread(target=self._run, name="simulated-engine", daemon=True)
        self._thread.start()

    def add(self, client: int, frames: Sequence[Frame]) -> None:
        try:
            self._add(client, messages.decode_request(frames))
        except (msgspec.MsgspecError, UnicodeDecodeError, InvalidInput) as error:
            request_id = messages.request_id_of(frames)
            log.warning("request %s refused: %s", request_id, error)
            if request_id is not None:
                reason = error.message if isinstance(error, InvalidInput) else None
                refused = EngineCoreOutput(
                    request_id=request_id, new_token_ids=[], finish_reason=FinishReason.ERROR, stop_reason=reason
                )
                self._send(client, EngineCoreOutputs(outputs=[refused], timestamp=time.monotonic()))

    def _add(self, client: int, request: EngineCoreRequest) -> None:
        with self._changed:
            if not self._busy:
                self._last_progress = time.monotonic()
            self._scheduler.add(client, request, time.monotonic())
            self._changed.notify_all()

    def probe(self) -> None:
        params = SamplingParams(max_tokens=1)
        request = EngineCoreRequest(
            request_id="probe", prompt_token_ids=[0], sampling_params=params, arrival_time=time.time()
        )
        self._add(NOBODY, request)

    def abort(self, client: int, request_ids: list[str]) -> None:
        with self._changed:
            self._scheduler.abort(client, request_ids)

    def abort_client(self, client: int) -> None:
        with self._changed:
            self._scheduler.abort(client)

    def call(self, client: int, call_id: int, method: str, args: Sequence[Any]) -> None:
        if method == "get_supported_tasks":
            answer = messages.UtilityOutput(call_id, result=(None, self.info.supported_tasks))
        else:
            answer = messages.UtilityOutput(call_id, failure_message=f"method: {method!r} is not simulated")
        self._send(client, EngineCoreOutputs(utility_output=answer, timestamp=time.monotonic()))

    def follow_blocks(self, client: int) -> None:
        """It has no prefix cache."""

    def next_output(self) -> tuple[int, Sequence[Frame]] | None:
        message = self._messages.get()
        if message is None:
            # For whoever asks next.
            self._messages.put(None)
        return message

    def hear(self, frames: Sequence[Frame]) -> None:
        """Simulated ranks run apart: they have nothing to say to each other."""

    def load(self) -> ReplicaLoad:
        with self._changed:
            load = self._scheduler.load()
        return replace(load, samples=self._samples(load))

    def _samples(self, load: ReplicaLoad) -> tuple[EngineSample, ...]:
        """What vLLM would show of it, and a simulation has."""
        sizes = {"block_size": self.info.block_size, "num_gpu_blocks": self.info.kv_tokens // self.info.block_size}
        return (
            ("vllm:num_requests_running", self._labels, load.running),
            ("vllm:num_requests_waiting", self._labels, load.waiting),
            ("vllm:kv_cache_usage_perc", self._labels, load.kv_usage),
            ("vllm:cache_config_info", (*((name, str(value)) for name, value in sizes.items()), ("engine", "0")), 1),
        )

    @property
    def error(self) -> BaseException | None:
        return self._error

    @property
    def last_step_age_s(self) -> float | None:
        with self._changed:
            return time.monotonic() - self._last_progress if self._busy else None

    def give_back(self) -> None:
        """Tell clients that what they have here is aborted, as vLLM does when it shuts down."""
        with self._changed:
            told = self._scheduler.abort_all()
        for client, outputs in told.items():
            self._send(client, EngineCoreOutputs(outputs=outputs, timestamp=time.monotonic()))

    def shutdown(self) -> None:
        self.give_back()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()

    def hang(self) -> None:
        """For tests of health checks: take requests, but never step again."""
        with self._changed:
            self._hanging = True

    def kill(self, error: BaseException) -> None:
        """For tests of failover: die of this error at once, with whatever is in work."""
        with self._changed:
            if not self._ended:
                self._error = error
            self._ended = True
            self._changed.notify_all()

    @property
    def _busy(self) -> bool:
        return self._in_step or self._scheduler.has_work

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except Exception as error:  # a bug in the model: die as a real engine would, and say of what
            log.exception("simulated engine died")
            self._error = error
        finally:
            self._messages.put(None)

    def _step(self) -> bool:
        """Wait for work, step once and send what came out; False once the engine has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or (self._scheduler.has_work and not self._hanging))
            if self._ended:
                return False
            result = self._scheduler.step(time.monotonic())
            self._in_step = True
            if self._realtime:
                self._changed.wait_for(lambda: self._ended, timeout=result.end_s - time.monotonic())
            if self._ended:
                return False
            self._in_step = False
            self._last_progress = now = time.monotonic()
        for client, outputs in result.outputs.items():
            self._send(client, EngineCoreOutputs(outputs=outputs, timestamp=now))
        return True

    def _send(self, client: int, message: EngineCoreOutputs) -> None:
        if client != NOBODY:
            self._messages.put((client, messages.encode(message)))
