"""Online and bulk work in one engine: a scheduler in vLLM's place, by vLLM's own ``scheduler_cls``.

vLLM's priority policy orders its waiting queue and nothing else: what runs is served in the order of admission, and a
waiting request takes no place of a running one. Here a row of bulk priority

- is *parked* while online work needs the step: it keeps its KV blocks and gets no token in it. It joins steps with
  online work only as far as that lengthens them by ``max_slowdown``, and where some tokens of a step are free, as on
  GPUs, with these alone;
- is *given up* where an online request needs its slot or its blocks: it waits again, and what the prefix cache (or the
  host, with offload on) still has of it need not be computed again. The ones with the least to recompute go first;
- in steps without online work takes as much as fits ``max_step_s``, since a request that arrives has to wait for the
  end of a step. Where the engine is a rank of a data-parallel group, that is without online work in any of its ranks:
  they step together.

How long a step takes is learned from the engine's own steps (:mod:`hycluster.engine.step_time`); what it leaves to bulk
rows is counted in :mod:`hycluster.engine.step_room`.

Pinned to vLLM 0.32.0; ``tests/engine/test_scheduler.py`` runs it on vLLM's own scheduler. It relies on:

- ``schedule`` asks ``_reserve_prefill_lookahead`` last how many tokens a row gets, running rows first, in the order of
  ``running``; 0 passes a running row over, and ends the admission of waiting ones;
- ``schedule`` admits from ``kv_holding_waiting``, then from ``waiting``, while they are true;
- both get their blocks from ``kv_cache_manager.allocate_slots``, which changes nothing where it returns None;
- ``_preempt_request`` may be called between two steps, and within one for a row that is not in it;
- all rows that are in a step, and no more, count for ``max_loras``;
- a request's ``trace_headers`` come back with each of its outputs: by them a row tells what became of it here.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from hycluster.core import ColocationLoad
from hycluster.engine.rank_work import RankWork, Siblings
from hycluster.engine.scheduled_work import coming_work, scheduled_work
from hycluster.engine.shares import TenantShares
from hycluster.engine.step_room import BulkRow, Slowdown, StepRoom
from hycluster.engine.step_time import StepTime, StepWork
from hycluster.engine.waiting import WaitingRequests, is_bulk, lora_of
from hycluster.engine.warm_blocks import WarmQueue
from hycluster.settings.model import Colocation
from hycluster.timeline import GIVEN_UP, PARKED_S

logger = logging.getLogger(__name__)

# Where the settings lie on vLLM's scheduler configuration. Not in ``additional_config``: what is in there counts for
# the cache of compiled models, and a bound on waiting would have them compiled anew.
_SETTINGS = "hycluster_colocation"
# A step of one row has to be longer than its bound by so much, and steps to be predicted this well, to be told of;
# which is once an engine.
_TOO_LONG, _SURE = 1.5, 0.2
# With nobody to make room for, a step in so many, and in so many seconds, is enough to follow the machine.
_LEARN_EVERY, _LEARN_EVERY_S = 8, 0.05


def use_colocation(config: VllmConfig, colocation: Colocation) -> None:
    """Have an engine of this configuration schedule with this module, if it can; see :func:`why_not_colocated`."""
    if not colocation.enabled or why_not_colocated(config) is not None:
        return
    scheduler = config.scheduler_config
    scheduler.scheduler_cls = AsyncColocationScheduler if scheduler.async_scheduling else ColocationScheduler
    setattr(scheduler, _SETTINGS, colocation)


def why_not_colocated(config: VllmConfig) -> str | None:
    """What an engine of this configuration has instead of this module's scheduler, if it can't have that."""
    scheduler = config.scheduler_config
    if scheduler.scheduler_cls is not None:
        name = scheduler.scheduler_cls
        return f"its scheduler is {name if isinstance(name, str) else name.__name__}"
    if scheduler.policy != "priority":
        return f"engine.scheduling_policy is {scheduler.policy!r}, which knows no batch requests"
    return None


def colocation_load(scheduler: object) -> ColocationLoad | None:
    """What an engine's scheduler has to say; None if it is not one of these. May be called by any thread."""
    return scheduler.load() if isinstance(scheduler, ColocationScheduler) else None


class ColocationScheduler(Scheduler):
    """For engines that schedule a step when the one before is over.

    Attributes:
        clock: seconds; replaced where time is virtual.
        learn_every_s: of steps with nobody to make room, one in so many seconds is learned from.
        siblings: the other ranks of its data-parallel group, if it is in one; see :class:`Siblings`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.colocation: Colocation = getattr(self.scheduler_config, _SETTINGS, Colocation())
        assert self.policy == SchedulingPolicy.PRIORITY, "colocation needs vLLM's priority policy"
        # Under names of their own too: vLLM's are declared for any queue.
        self.waiting = self._waiting = WaitingRequests(self.waiting)
        self.kv_holding_waiting = self._kv_holding = WaitingRequests(self.kv_holding_waiting)
        self.clock: Callable[[], float] = time.monotonic
        self.step_time = StepTime()
        self._slowdown = Slowdown(self.colocation.max_slowdown)
        self.siblings = Siblings()
        self._tenants = TenantShares(
            self._waiting,
            self.max_num_active_reqs,
            self.kv_cache_manager.block_pool.num_gpu_blocks * self.block_size,
            self.max_num_scheduled_tokens,
        )
        # Those that may not have ended yet.
        self._bulk: set[str] = set()
        self._room = StepRoom()
        # In flight: when it was scheduled, what is in it, which rows were left out.
        self._begun: dict[int, tuple[float, StepWork, list[Request]]] = {}
        # By bulk row, for how long it was left out of steps, and how often it was given up.
        self._set_aside: dict[str, list[float]] = {}
        self._last_end = 0.0
        self.learn_every_s, self._learned_at = _LEARN_EVERY_S, -math.inf
        # Whether online work was there for the last step and got nothing in it: it waits for something else than bulk.
        self._stalled = False
        self._told_too_long = False
        self._parked = self._given_up = 0
        self._online_tokens = self._bulk_tokens = 0
        self._predicted_s = self._real_s = 0.0
        # Time that ``min_batch_share`` owes to bulk rows.
        self._credit_s = 0.0
        # Cutting a chunk anew would cut where the state of such a model can't be kept, or what it needs at once.
        self._whole_chunks = (
            self.need_mamba_block_aligned_split
            or not self.scheduler_config.enable_chunked_prefill
            or self.vllm_config.model_config.runner_type != "generate"
        )
        self._warm = self._keep_sessions(self.kv_cache_manager.block_pool)
        self._allocate = self.kv_cache_manager.allocate_slots
        self._asked = False
        self._ask_here(True)

    def _keep_sessions(self, pool: BlockPool) -> WarmQueue | None:
        keep_s = self.colocation.keep_sessions_s
        now_s = lambda: self.clock()  # noqa: E731, PLW0108  # the clock may be another one by then
        return WarmQueue(pool, keep_s, now_s) if keep_s and pool.enable_caching else None

    def _free_request_blocks(self, request: Request) -> None:
        """Of one that has ended or is preempted; a session's are kept for its next turn."""
        if (warm := self._warm) is None or request.session_id is None or is_bulk(request):
            super()._free_request_blocks(request)
            return
        warm.keeping = True
        try:
            super()._free_request_blocks(request)
        finally:
            warm.keeping = False

    def add_request(self, request: Request) -> None:
        if is_bulk(request):
            self._bulk.add(request.request_id)
        if request.request_id not in self.requests:
            self._tenants.come(request, [*self._waiting.accounts, *self._kv_holding.accounts])
        super().add_request(request)

    # What a step is given.

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        begun = self.clock()
        self._bulk &= self.requests.keys()
        if len(self._set_aside) > 2 * len(self._bulk):
            self._set_aside = {row: said for row, said in self._set_aside.items() if row in self.requests}
        self._ask_here(bool(self._bulk or (self._tenants and not self._alone)))
        if not self._bulk:
            return self._schedule_online(begun, throttle_prefills)
        online = [request for request in self.running if not is_bulk(request)]
        waiting = self._online_waiting()
        starting = [request for request in waiting if not self._is_blocked_waiting_status(request.status)]
        if (online or starting) and not self._stalled:
            self._room = self._beside(online, starting)
        else:
            self._room = self._bulk_only()
        self._room.loras = {lora_of(request) for request in (*online, *starting)} - {0}
        self._room.max_loras = self.lora_config.max_loras if self.lora_config else 0
        if len(online) < len(self.running):
            # vLLM serves what runs in this order.
            self.running = online + [request for request in self.running if is_bulk(request)]
            self._make_room(len(waiting))
        self._share()
        # Nothing that waits with KV blocks in hand may end the admission before online requests had their turn.
        self._kv_holding.closed = bool(starting)
        try:
            output = super().schedule(throttle_prefills)
        finally:
            self._kv_holding.closed = self._waiting.closed = False
        self._count(output, begun)
        self._stalled = bool(online or starting) and len(output.num_scheduled_tokens) == len(self._room.taken)
        return output

    def _ask_here(self, asked: bool) -> None:
        """Whether ``schedule`` asks here what each row gets; it is dear, and of no use where nobody makes room."""
        if asked == self._asked:
            return
        self._asked = asked
        ours: Any = self
        if asked:
            self.kv_cache_manager.allocate_slots = self._allocate_or_take  # type: ignore[method-assign]
            vars(ours).pop("_reserve_prefill_lookahead", None)
        else:
            self.kv_cache_manager.allocate_slots = self._allocate  # type: ignore[method-assign]
            ours._reserve_prefill_lookahead = super()._reserve_prefill_lookahead

    def _schedule_online(self, begun: float, throttle_prefills: bool) -> SchedulerOutput:
        """A step with nobody to make room."""
        self._room, self._parked, self._stalled = StepRoom(), 0, False
        if not (alone := self._alone):
            self._share()
        output = super().schedule(throttle_prefills)
        if alone:
            self._tenants.count_alone(self.running, output.num_scheduled_tokens, begun)
        learns = not self.current_step % _LEARN_EVERY and begun - self._learned_at >= self.learn_every_s
        if self.step_time.known and not self.siblings and not learns:
            self._online_tokens += output.total_num_scheduled_tokens
        else:
            self._learned_at = begun
            self._count(output, begun)
        return output

    @property
    def _alone(self) -> bool:
        """Whoever pays for a request here is one and the same; those with blocks in hand may be anybody's."""
        return self._tenants.lone is not None and not self._kv_holding.accounts

    def _share(self) -> None:
        """Who of several tenants comes into the step, and who leaves for it."""
        tenants = self._tenants
        if not tenants:
            return
        self.running = tenants.begin(self.running, self.clock(), self.step_time)
        if not tenants.contended or self.pause_state != PauseState.UNPAUSED:
            return
        free = self.max_num_active_reqs - len(self.running) - self.num_waiting_for_streaming_input
        leaving = tenants.claim(
            free,
            (self.kv_cache_manager.block_pool.get_num_free_blocks() - len(self.running)) * self.block_size,
            self.running,
            self._request_blocks_can_be_freed,
            self._may_start,
        )
        for request in leaving:
            self._give_up(request)

    def _may_start(self, request: Request) -> bool:
        """Whether it would come in if there was a slot for it; else a row would be given up for nothing."""
        if self._is_blocked_waiting_status(request.status):
            return False
        lora = lora_of(request)
        if not lora or self.lora_config is None:
            return True
        loras = {lora_of(row) for row in self.running} - {0}
        return lora in loras or len(loras) < self.lora_config.max_loras

    def _online_waiting(self) -> list[Request]:
        if self.pause_state != PauseState.UNPAUSED:
            return []
        return [*self._waiting.online(), *self._kv_holding.online()]

    def _beside(self, online: list[Request], waiting: list[Request]) -> StepRoom:
        """A step with online work: bulk may lengthen it by a share."""
        if not self.step_time.known or self._short_of_blocks(waiting):
            return StepRoom(bulk_s=0.0, others=True)
        cost, elsewhere = self.step_time, self.siblings.tokens
        work = coming_work((*online, *waiting), len(online) + len(waiting), self.max_num_scheduled_tokens, elsewhere)
        may_add, only_free = self._slowdown.may_add(work, cost), cost.free_tokens > 0
        if self._credit_s > may_add:
            return StepRoom.of(self._credit_s, cost, work)
        experts_s = self._for_experts(work.routed_tokens, may_add)
        if experts_s is None:
            return StepRoom(bulk_s=0.0, others=True)
        return StepRoom.of(may_add, cost, work, only_free=only_free, experts_s=experts_s)

    def _for_experts(self, read: int, may_add: float) -> float | None:
        """Seconds for the experts that bulk rows read on top of so many tokens' ones; None while that is saved for."""
        cost = self.step_time
        if cost.experts is None:
            return 0.0
        more = sum(self._lacks(request) for request in self.running if is_bulk(request))
        if self._waiting and len(self.running) < self.max_num_active_reqs:
            more += self.max_num_scheduled_tokens
        if cost.free_tokens:
            more = min(more, max(0, cost.free_tokens - read))
        elif cost.sequence_s:
            more = min(more, int(may_add / cost.sequence_s))
        # Each rank's rows read others.
        return self._slowdown.experts_s(read, more, may_add / self.siblings.ranks, cost)

    def _short_of_blocks(self, waiting: list[Request]) -> bool:
        """Whether there are too few for online requests that wait: then bulk rows get none of them in this step.

        One that did not get its block would have another one preempted, and a step with preemptions admits nobody.
        """
        rows = len(self.running) + len(waiting)
        wanted = rows + sum(-(-request.num_tokens // self.block_size) for request in waiting)
        return bool(waiting) and wanted > self.kv_cache_manager.block_pool.get_num_free_blocks()

    def _bulk_only(self) -> StepRoom:
        """Nobody waits; somebody may come, and then waits for the steps that are in flight."""
        cost, colocation = self.step_time, self.colocation
        beside = self.siblings.online_work
        if beside is not None:
            # A rank's step is over when those of all others are: what the longest of them needs anyhow is free.
            # The experts that its rows read are not, since the others' rows read them too.
            online_s, elsewhere = cost.predict(beside), self.siblings.tokens
            experts_s = self._for_experts(elsewhere, colocation.max_slowdown * online_s)
            if experts_s is None:
                return StepRoom(bulk_s=0.0)
            room_s = (1 + colocation.max_slowdown) * online_s - cost.base_s - cost.experts_s(beside.routed_tokens)
            return StepRoom.of(room_s, cost, elsewhere_tokens=elsewhere, experts_s=experts_s)
        bound = colocation.max_step_s / max(1, self.vllm_config.max_concurrent_batches)
        shortest = cost.base_s + cost.sequence_s + cost.experts_s(1)
        if cost.error < _SURE and shortest > _TOO_LONG * bound and not self._told_too_long:
            self._told_too_long = True
            logger.warning(
                "colocation.max_step_s: a step of one row takes %.3f s here, more than the bound leaves (%.3f s):"
                " batch requests get little", shortest, bound,
            )  # fmt: skip
        # Where even the shortest step is over the bound, an arrival waits for it in any case.
        least = shortest - cost.base_s + colocation.max_slowdown * shortest
        return StepRoom.of(max(bound - cost.base_s, least), cost)

    # What a row is given.

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        whole = self._whole_chunks or request.has_encoder_inputs or request.num_tokens - num_computed_tokens <= 1
        if tokens and not is_bulk(request):
            if self._tenants:
                tokens = self._tenants.grant(request, tokens, whole=whole)
            self._room.others |= tokens > 0
        if not tokens or not is_bulk(request):
            return tokens
        row = BulkRow(request.request_id, num_computed_tokens, tokens, not whole, lora_of(request))
        return self._room.grant(row, self.step_time)

    # Slots and blocks.

    def _make_room(self, waiting: int) -> None:
        """Slots for the online requests that wait: bulk rows give up theirs, and get no new ones instead."""
        over = len(self.running) + self.num_waiting_for_streaming_input + waiting - self.max_num_active_reqs
        while over > 0 and (victim := self._cheapest()) is not None:
            self._give_up(victim)
            over -= 1
        # Also what is not ready yet, as while its grammar is compiled, finds its slot free.
        self._waiting.closed |= waiting > 0 and over == 0

    def _allocate_or_take(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Blocks for a row; for an online one those of bulk rows, or of a tenant that has too many of them."""
        while (blocks := self._allocate(request, *args, **kwargs)) is None and not is_bulk(request):
            victim = self._cheapest() if self._bulk else None
            if victim is None and self._tenants:
                may_leave = self._request_blocks_can_be_freed
                victim = self._tenants.victim(request, self.running, may_leave)
            if victim is None:
                return None
            self._give_up(victim)
        if self._tenants and blocks is not None:
            self._note_given(request, *args, **kwargs)
        return blocks

    def _note_given(
        self,
        request: Request,
        tokens: int,
        num_new_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        **_: Any,
    ) -> None:
        cached = request.num_computed_tokens + num_new_computed_tokens + num_external_computed_tokens
        self._tenants.given(request, tokens, cached, is_new=request.status != RequestStatus.RUNNING)

    def _cheapest(self) -> Request | None:
        """The bulk row with the least to compute again, of those that are not in this step."""
        left = [row for row in self.running if is_bulk(row) and row.request_id not in self._room.taken]
        rows = filter(self._request_blocks_can_be_freed, left)
        return min(rows, key=lambda r: (r.num_computed_tokens, -r.arrival_time), default=None)

    def _give_up(self, request: Request) -> None:
        self.running.remove(request)
        self._preempt_request(request, time.monotonic(), drop_stale_output=self.requires_kv_delivery)
        if is_bulk(request):
            self._given_up += 1
            # It was made to leave; it must not come back in the same step.
            self._waiting.closed = True
        else:
            self._tenants.gave_up(request)
        self._set_aside.setdefault(request.request_id, [0.0, 0.0])[1] += 1

    # What is known afterwards.

    def _count(self, output: SchedulerOutput, begun: float) -> None:
        taken = self._room.taken
        rows = output.num_scheduled_tokens
        requests = self.requests
        total = output.total_num_scheduled_tokens
        work = scheduled_work(rows, total, requests)
        bulk = sum([rows.get(one, 0) for one in taken])
        self._bulk_tokens += bulk
        self._online_tokens += total - bulk
        parked = list(filter(self._was_parked, self.running)) if self._bulk else []
        self._parked = len(parked)
        self._credit_s = min(max(0.0, self._credit_s - self._room.used_s), self.colocation.max_step_s)
        self._begun[id(output)] = begun, work, parked
        if not self._bulk and not self.siblings:
            return
        online = {one: tokens for one, tokens in rows.items() if one not in taken}
        alone = scheduled_work(online, total - bulk, requests, self.siblings.tokens)
        if self.siblings:
            self.siblings.tell(RankWork.of(work, alone))
        if online and self.step_time.known:
            self._slowdown.note(alone, self.step_time)
        if online or (self.siblings and self.siblings.online_work):
            self._slowdown.spend(self._room.used_s if online else self._room.read_s)

    def _was_parked(self, request: Request) -> bool:
        return is_bulk(request) and request.request_id not in self._room.taken and self._lacks(request) > 0

    @staticmethod
    def _lacks(request: Request) -> int:
        """Tokens that a row could have now; with pipeline stages some have theirs in a step before this one."""
        return request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        now = self.clock()
        begun, work, parked = self._begun.pop(id(scheduler_output), (now, StepWork(), []))
        self._tell_aside(scheduler_output)
        if work.sequences:
            # Steps in flight together: this one's time began when the one before it was over.
            real = now - max(begun, self._last_end)
            work = self.siblings.longest(work)
            self._predicted_s, self._real_s = self.step_time.predict(work), real
            self.step_time.learn(work, real)
            self._credit_s += self.colocation.min_batch_share * real
            for row in parked:
                self._set_aside.setdefault(row.request_id, [0.0, 0.0])[0] += real
        self._last_end = now
        return super().update_from_output(scheduler_output, model_runner_output)

    def _tell_aside(self, output: SchedulerOutput) -> None:
        """Have rows that get a token say for how long they were left out before it: vLLM gives their headers back."""
        if not self._set_aside:
            return
        for row in self._set_aside.keys() & output.num_scheduled_tokens.keys():
            if (request := self.requests.get(row)) is not None:
                parked_s, given_up = self._set_aside[row]
                request.trace_headers = {PARKED_S: f"{parked_s:.6f}", GIVEN_UP: f"{given_up:.0f}"}

    def load(self) -> ColocationLoad:
        """As it stands; may be called by any thread."""
        running = sum(map(is_bulk, self.running.copy()))
        return ColocationLoad(
            # Of the last step; rows have ended since.
            parked=min(self._parked, running),
            given_up=self._given_up,
            bulk_tokens=self._bulk_tokens,
            online_tokens=self._online_tokens,
            predicted_step_s=self._predicted_s,
            real_step_s=self._real_s,
            bulk_running=running,
            bulk_waiting=max(0, len(self._bulk) - running),
            step_time_s=self.step_time.coefficients_s,
        )


class AsyncColocationScheduler(ColocationScheduler, AsyncScheduler):
    """For engines that schedule a step while the one before is computed."""
