"""A real engine in this process, asked by token ids, with a note of every step: what virtual time is fitted to and
compared with.

Reads the scheduler of a :class:`hycluster.engine.vllm.VllmEngine`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.serial_utils import MsgpackDecoder

from hycluster.core import Priority
from hycluster.engine.routed_weights import RoutedWeights
from hycluster.engine.scheduler import ColocationScheduler
from hycluster.engine.step_time import StepTime, StepWork
from hycluster.engine.vllm import VllmEngine
from hycluster.errors import EngineStartFailed, SettingsError
from hycluster.settings.model import Model
from hycluster.simulate.machine import sizes_in


class NotedSteps(StepTime):
    """Learns as a scheduler does, and keeps what it has learned from."""

    def __init__(self, experts: RoutedWeights | None = None) -> None:
        super().__init__(experts)
        self.steps: list[tuple[StepWork, float]] = []

    def learn(self, work: StepWork, real_s: float) -> None:
        self.steps.append((work, real_s))
        super().learn(work, real_s)


class RealEngine:
    """An engine of a model's settings; one caller, by token ids.

    Attributes:
        notes: its steps from now on.
        sizes: its own, by the names that ``models[].simulated`` has for them.
        tokens: by request, when each of its tokens came (``time.monotonic``).

    Raises:
        SettingsError: its scheduler is not hycluster's, which is what takes note of steps.
    """

    def __init__(self, model: Model, model_path: str) -> None:
        self.engine = VllmEngine(model, model_path)
        self.tokens: dict[str, list[float]] = {}
        self._changed = threading.Condition()
        self._over: set[str] = set()
        self._ended = False
        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        scheduler = self.engine._core.scheduler
        if not isinstance(scheduler, ColocationScheduler):
            self.close()
            raise SettingsError(
                f"models: {model.name}: colocation.enabled: must be true, and its scheduler hycluster's"
            )
        self.config = scheduler.vllm_config
        # When it has been shut down, vLLM has forgotten how many blocks there were.
        self.sizes = sizes_in(self.config)
        self.notes = scheduler.step_time = NotedSteps(scheduler.step_time.experts)
        scheduler.learn_every_s = 0.0
        threading.Thread(target=self._read, name="tokens", daemon=True).start()

    def ask(
        self, request_id: str, prompt: Sequence[int], max_tokens: int, priority: Priority = Priority.ONLINE
    ) -> None:
        """Queue a request."""
        self.tokens[request_id] = []
        self.engine.ask(0, request_id, prompt, max_tokens, priority)

    def wait(self, *request_ids: str) -> None:
        """Until these are over.

        Raises:
            EngineStartFailed: the engine died.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._over.issuperset(request_ids))
        if self._ended:
            raise EngineStartFailed(f"the engine died: {self.engine.error}")

    def over(self, beginning: str = "", more_than: int = -1, within_s: float | None = None) -> int:
        """How many requests whose name begins so are over; waits until they are more than so many."""

        def count() -> int:
            return sum(each.startswith(beginning) for each in self._over)

        with self._changed:
            self._changed.wait_for(lambda: self._ended or count() > more_than, within_s)
            return count()

    def abort_all(self) -> None:
        """Drop whatever is in work."""
        self.engine.abort(0, [each for each in self.tokens if each not in self._over])

    def close(self) -> None:
        self.engine.shutdown()

    def _read(self) -> None:
        while (message := self.engine.next_output()) is not None:
            now = time.monotonic()
            for output in self._decoder.decode(message[1]).outputs:
                self.tokens.setdefault(output.request_id, []).extend([now] * len(output.new_token_ids))
                if output.finish_reason is not None:
                    with self._changed:
                        self._over.add(output.request_id)
                        self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
