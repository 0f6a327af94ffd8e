"""Online and bulk work in one engine: a scheduler in vLLM's place, by vLLM's own ``scheduler_cls``.

vLLM's priority policy orders its waiting queue and nothing else: what runs is served in the order of admission, and a
waiting request takes no place of a running one. Here a row of bulk priority

- is *parked* while online work needs the step: it keeps its KV blocks and gets no token in it. It joins a step with
  online work only as far as that lengthens the step by ``max_slowdown``;
- is *given up* where an online request needs its slot or its blocks: it waits again, and what the prefix cache (or the
  host, with offload on) still has of it need not be computed again. The ones with the least to recompute go first;
- in steps without online work takes as much as fits ``max_step_s``, since a request that arrives has to wait for the
  end of a step.

How long a step takes is learned from the engine's own steps (:mod:`hycluster.engine.step_time`).

Pinned to vLLM 0.32.0; ``tests/engine/test_scheduler.py`` runs it on vLLM's own scheduler. It relies on:

- ``schedule`` asks ``_reserve_prefill_lookahead`` last how many tokens a row gets, running rows first, in the order of
  ``running``; 0 passes a running row over, and ends the admission of waiting ones;
- ``schedule`` admits from ``kv_holding_waiting``, then from ``waiting``, while they are true;
- both get their blocks from ``kv_cache_manager.allocate_slots``, which changes nothing where it returns None;
- ``_preempt_request`` may be called between two steps, and within one for a row that is not in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import PriorityRequestQueue, SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from hycluster.core import ColocationLoad, Priority
from hycluster.engine.step_time import StepTime, StepWork
from hycluster.settings.model import Colocation

# A chunk of a prompt has at least so many tokens, or as many as cost what its row does if these are fewer; unless the
# step has nothing else.
LEAST_CHUNK_TOKENS = 16
# A step may be so many times as large as any before it: beyond that its predicted time is a guess.
_GROWTH = 2
# Without online work a step is cut at this many sequences until there are enough steps to know better.
_FIRST_SEQUENCES, _FIRST_TOKENS = 4, 64


def use_colocation(config: VllmConfig, colocation: Colocation) -> None:
    """Have an engine of this configuration schedule with this module, if it can.

    It can't where the settings name a scheduler of their own or another policy than vLLM's priority.
    """
    scheduler = config.scheduler_config
    if not colocation.enabled or scheduler.scheduler_cls is not None or scheduler.policy != "priority":
        return
    scheduler.scheduler_cls = AsyncColocationScheduler if scheduler.async_scheduling else ColocationScheduler
    additional: Any = config.additional_config
    additional["hycluster"] = {**additional.get("hycluster", {}), "colocation": colocation.model_dump()}


def colocation_load(scheduler: object) -> ColocationLoad | None:
    """What an engine's scheduler has to say; None if it is not one of these. May be called by any thread."""
    return scheduler.load() if isinstance(scheduler, ColocationScheduler) else None


def is_bulk(request: Request) -> bool:
    """Whether a request has to make room for others."""
    return request.priority >= Priority.BATCH


class _Queue(PriorityRequestQueue):
    """vLLM's queue with a gate: while it is closed, bulk requests are there but not to be admitted."""

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        super().__init__()
        self.closed = False
        for request in requests:
            self.add_request(request)

    def __bool__(self) -> bool:
        return bool(self._heap) and not (self.closed and is_bulk(self._heap[0]))

    @property
    def bulk(self) -> int:
        """How many of them are bulk; may be asked by any thread."""
        return sum(is_bulk(request) for request in list(self._heap))

    def online(self) -> list[Request]:
        """Those that do not wait for bulk. Cheap where there are none: the heap's top is the most urgent."""
        if not self._heap or is_bulk(self._heap[0]):
            return []
        return [request for request in self._heap if not is_bulk(request)]


@dataclass(slots=True)
class _Step:
    """What one step leaves to bulk rows, and what they took of it.

    Attributes:
        bulk_s: time that they may add to it.
        used_s: time that they add to it, as predicted.
        sequences, prefill_tokens: most rows, and most tokens of prompts, for all of the step.
        least_chunk: tokens of a prompt below which a row waits for a step with more room.
        others: whether anything else is in it, so that it need not be a bulk row.
        taken: ids of the bulk rows in it.
    """

    bulk_s: float = math.inf
    sequences: float = math.inf
    prefill_tokens: float = math.inf
    least_chunk: int = LEAST_CHUNK_TOKENS
    others: bool = False
    used_s: float = 0.0
    taken: set[str] = field(default_factory=set)


class ColocationScheduler(Scheduler):
    """For engines that schedule a step when the one before is over.

    Attributes:
        clock: seconds; replaced where time is virtual.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        additional: Any = self.vllm_config.additional_config
        self.colocation = Colocation.model_validate(additional.get("hycluster", {}).get("colocation", {}))
        assert self.policy == SchedulingPolicy.PRIORITY, "colocation needs vLLM's priority policy"
        # Under names of their own too: vLLM's are declared for any queue.
        self.waiting = self._waiting = _Queue(self.waiting)
        self.kv_holding_waiting = self._kv_holding = _Queue(self.kv_holding_waiting)
        self.clock: Callable[[], float] = time.monotonic
        self.step_time = StepTime()
        self._step = _Step()
        # In flight: when it was scheduled, what is in it.
        self._begun: dict[int, tuple[float, StepWork]] = {}
        self._last_end = 0.0
        self._parked = self._given_up = 0
        self._online_tokens = self._bulk_tokens = 0
        self._predicted_s = self._real_s = 0.0
        # Time that ``min_batch_share`` owes to bulk rows.
        self._credit_s = 0.0
        # Cutting a chunk anew would cut where the state of such a model can't be kept, or without its images.
        self._whole_chunks = self.need_mamba_block_aligned_split
        self._allocate = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_or_take  # type: ignore[method-assign]

    # What a step is given.

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        begun = self.clock()
        online = [request for request in self.running if not is_bulk(request)]
        waiting = [r for r in (*self._waiting.online(), *self._kv_holding.online()) if self._can_start(r)]
        bulk_runs = len(online) < len(self.running)
        if online or waiting:
            self._step = self._beside(online, waiting)
            if bulk_runs:
                # vLLM serves what runs in this order.
                self.running = online + [request for request in self.running if is_bulk(request)]
                self._make_room(len(waiting))
        else:
            self._step = self._bulk_only()
        # Nothing that waits with KV blocks in hand may end the admission before online requests had their turn.
        self._kv_holding.closed = bool(waiting)
        try:
            output = super().schedule(throttle_prefills)
        finally:
            self._kv_holding.closed = self._waiting.closed = False
        self._count(output, begun)
        return output

    def _can_start(self, request: Request) -> bool:
        return not self._is_blocked_waiting_status(request.status)

    def _beside(self, online: list[Request], waiting: list[Request]) -> _Step:
        """A step with online work: bulk may lengthen it by a share."""
        if not self.step_time.known or self._short_of_blocks(waiting):
            return _Step(bulk_s=0.0)
        work = self._online_work(online, waiting)
        return self._with_room_for(max(self.colocation.max_slowdown * self.step_time.predict(work), self._credit_s))

    def _short_of_blocks(self, waiting: list[Request]) -> bool:
        """Whether there are too few for online requests that wait: then bulk rows get none of them in this step.

        One that did not get its block would have another one preempted, and a step with preemptions admits nobody.
        """
        rows = len(self.running) + len(waiting)
        wanted = rows + sum(-(-request.num_tokens // self.block_size) for request in waiting)
        return bool(waiting) and wanted > self.kv_cache_manager.block_pool.get_num_free_blocks()

    def _online_work(self, online: list[Request], waiting: list[Request]) -> StepWork:
        left = self.max_num_scheduled_tokens
        prefill = kv = 0
        for request in (*online, *waiting):
            tokens = max(1, min(left, request.num_tokens - request.num_computed_tokens))
            prefill += tokens - 1
            kv += request.num_computed_tokens
            left -= tokens
            if left <= 0:
                break
        return StepWork(prefill, len(online) + len(waiting), kv)

    def _bulk_only(self) -> _Step:
        """Nobody waits; somebody may come, and then waits for the steps that are in flight."""
        steps_in_flight = max(1, self.vllm_config.max_concurrent_batches)
        return self._with_room_for(max(0.0, self.colocation.max_step_s / steps_in_flight - self.step_time.base_s))

    def _with_room_for(self, bulk_s: float) -> _Step:
        least = LEAST_CHUNK_TOKENS
        if self.step_time.prefill_token_s > 0:
            # A chunk that costs less than its row does is not worth the row.
            least = max(1, min(least, math.ceil(self.step_time.sequence_s / self.step_time.prefill_token_s)))
        return _Step(
            bulk_s=bulk_s,
            sequences=max(_GROWTH * self.step_time.most_sequences, _FIRST_SEQUENCES),
            prefill_tokens=max(_GROWTH * self.step_time.most_prefill_tokens, _FIRST_TOKENS),
            least_chunk=least,
        )

    # What a row is given.

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if tokens and is_bulk(request):
            return self._grant(request, num_computed_tokens, tokens)
        self._step.others |= tokens > 0
        return tokens

    def _grant(self, request: Request, computed: int, tokens: int) -> int:
        """How many of these tokens a bulk row gets: all, a smaller chunk of its prompt, or none."""
        step, cost = self._step, self.step_time
        prompt = tokens - 1 if request.num_tokens - computed > 1 else 0
        row_s = cost.sequence_s + cost.kv_token_s * computed
        first = not step.others and not step.taken
        if (step.sequences < 1 or step.bulk_s <= 0) and not first:
            return 0
        if prompt:
            fits = step.prefill_tokens
            if cost.prefill_token_s > 0 and step.bulk_s < math.inf:
                fits = min(fits, (step.bulk_s - row_s) / cost.prefill_token_s)
            least = min(prompt, step.least_chunk)
            if fits < prompt and (self._whole_chunks or request.has_encoder_inputs) and not first:
                return 0
            if fits < prompt and not (self._whole_chunks or request.has_encoder_inputs):
                if fits < least and not first:
                    return 0
                prompt = max(least, int(fits))
                tokens = min(tokens, prompt + 1)
        elif row_s > step.bulk_s and not first:
            return 0
        takes = row_s + cost.prefill_token_s * prompt
        step.bulk_s -= takes
        step.used_s += takes
        step.sequences -= 1
        step.prefill_tokens -= prompt
        step.taken.add(request.request_id)
        return tokens

    # Slots and blocks.

    def _make_room(self, waiting: int) -> None:
        """Slots for the online requests that wait: bulk rows give up theirs."""
        over = len(self.running) + self.num_waiting_for_streaming_input + waiting - self.max_num_active_reqs
        while over > 0 and (victim := self._cheapest()) is not None:
            self._give_up(victim)
            over -= 1

    def _allocate_or_take(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Blocks for a row; for an online one those of bulk rows, if there are no others."""
        while (blocks := self._allocate(request, *args, **kwargs)) is None and not is_bulk(request):
            victim = self._cheapest()
            if victim is None:
                return None
            self._give_up(victim)
        return blocks

    def _cheapest(self) -> Request | None:
        """The bulk row with the least to compute again, of those that are not in this step."""
        rows = [
            request
            for request in self.running
            if is_bulk(request)
            and request.request_id not in self._step.taken
            and self._request_blocks_can_be_freed(request)
        ]
        return min(rows, key=lambda r: (r.num_computed_tokens, -r.arrival_time), default=None)

    def _give_up(self, request: Request) -> None:
        self.running.remove(request)
        self._preempt_request(request, time.monotonic(), drop_stale_output=self.requires_kv_delivery)
        # As in ``reset_prefix_cache``: what comes back gets all of its tokens told to the runner.
        self.prev_step_scheduled_req_ids.discard(request.request_id)
        self._given_up += 1
        # It was made to leave; it must not come back in the same step.
        self._waiting.closed = True

    # What is known afterwards.

    def _count(self, output: SchedulerOutput, begun: float) -> None:
        prefill = kv = bulk = 0
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            kv += request.num_computed_tokens
            if request.is_prefill_chunk or tokens > 1:
                prefill += tokens - 1
            if request_id in self._step.taken:
                bulk += tokens
        total = output.total_num_scheduled_tokens
        self._bulk_tokens += bulk
        self._online_tokens += total - bulk
        self._parked = sum(self._was_parked(request) for request in self.running)
        self._credit_s = min(max(0.0, self._credit_s - self._step.used_s), self.colocation.max_step_s)
        self._begun[id(output)] = begun, StepWork(prefill, len(output.num_scheduled_tokens), kv)

    def _was_parked(self, request: Request) -> bool:
        """A bulk row that could have had a token; with pipeline stages some have theirs in a step before this one."""
        left = request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
        return is_bulk(request) and request.request_id not in self._step.taken and left > 0

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        now = self.clock()
        begun, work = self._begun.pop(id(scheduler_output), (now, StepWork()))
        if work.sequences:
            # Steps in flight together: this one's time began when the one before it was over.
            real = now - max(begun, self._last_end)
            self._predicted_s, self._real_s = self.step_time.predict(work), real
            self.step_time.learn(work, real)
            self._credit_s += self.colocation.min_batch_share * real
        self._last_end = now
        return super().update_from_output(scheduler_output, model_runner_output)

    def load(self) -> ColocationLoad:
        """As it stands; may be called by any thread."""
        # Copies: the engine's thread goes on meanwhile.
        running = sum(is_bulk(request) for request in list(self.running))
        return ColocationLoad(
            # Of the last step; rows have ended since.
            parked=min(self._parked, running),
            bulk_running=running,
            bulk_waiting=self._waiting.bulk + self._kv_holding.bulk,
            given_up=self._given_up,
            bulk_tokens=self._bulk_tokens,
            online_tokens=self._online_tokens,
            predicted_step_s=self._predicted_s,
            real_step_s=self._real_s,
        )


class AsyncColocationScheduler(ColocationScheduler, AsyncScheduler):
    """For engines that schedule a step while the one before is computed."""
