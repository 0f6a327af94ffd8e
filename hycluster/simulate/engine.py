"""An engine without a model: vLLM's own scheduler and KV cache manager on a virtual clock.

Which rows are in a step, with how many tokens, which blocks they hold and who is preempted is what vLLM decides, with
its own code and whichever scheduler class is configured. Only the model runner is replaced: a step takes as long as a
function of its work says, and tokens come out of nowhere. Nothing else in it knows of time, so the same trace gives
the same outcome. Where the configuration has the next step scheduled while one is computed (async scheduling), so does
this: a request that comes waits for the step that runs and for the one behind it.

Pinned to vLLM 0.32.0: it builds a scheduler as ``EngineCore.__init__`` does, and steps it as ``step`` and
``step_with_batch_queue`` do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from vllm.config import KVEventsConfig, VllmConfig
from vllm.distributed.kv_events import BlockRemoved, BlockStored, EventBatch, NullEventPublisher
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, maybe_convert_block_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from hycluster.engine.fairness import payer_headers
from hycluster.engine.routed_weights import RoutedWeights
from hycluster.engine.scheduler import ColocationScheduler
from hycluster.engine.step_time import StepTime, StepWork, prefill_pairs
from hycluster.engine.waiting import is_bulk, take_payer

# What comes out; no token of a prompt that a trace's hash makes.
TOKEN = -1
# So many steps one after the other that compute nothing, with requests there, are a request that can never run.
_STUCK_STEPS = 100


class StuckEngine(RuntimeError):
    """No request that an engine has can ever run."""


def block_names(request: Request) -> list[int]:
    """Of its whole blocks, as in vLLM's KV events."""
    return [maybe_convert_block_hash(each) for each in request.block_hashes]  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class TokenAt:
    """One token of a request.

    Attributes:
        at_s: when its step was over.
        last: nothing comes after it.
        cached: of a request's first token, how many of the prompt's were in the prefix cache.
    """

    request_id: str
    at_s: float
    last: bool
    cached: int = 0


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that is being computed, or waits for the one before it."""

    output: SchedulerOutput
    sampled: list[list[int]]
    begin_s: float
    end_s: float
    prefill_tokens: int


# What was stored, and what was dropped, in this order of each message.
BlocksChanged = Callable[[Sequence[int], Sequence[int]], None]


class _Published(NullEventPublisher):
    """In the place of vLLM's ZMQ socket."""

    def __init__(self, tell: BlocksChanged) -> None:
        super().__init__()
        self._tell = tell

    def publish(self, events: EventBatch) -> None:
        for event in events.events:
            if isinstance(event, BlockStored):
                self._tell(event.block_hashes, ())  # type: ignore[arg-type]
            elif isinstance(event, BlockRemoved):
                self._tell((), event.block_hashes)  # type: ignore[arg-type]


class VirtualEngine:
    """One engine; whoever calls ``step`` owns the time.

    Args:
        config: vLLM's configuration; its scheduler class is the one that is run.
        kv_blocks: how many blocks the KV cache has.
        step_time: seconds that a step of this work takes.
        experts: what its scheduler knows of the model's experts.
        blocks: told of what its KV cache stores and drops, by vLLM's KV events; None: nobody wants to know.

    Attributes:
        now_s: the virtual clock; set it to move on while the engine is idle.
        steps, busy_s: how many steps have been computed, and for how long.
        online_s, added_s: how long steps with online rows would have taken with these alone, and what bulk rows added.
    """

    def __init__(
        self,
        config: VllmConfig,
        kv_blocks: int,
        step_time: Callable[[StepWork], float],
        experts: RoutedWeights | None = None,
        blocks: BlocksChanged | None = None,
    ) -> None:
        cache = config.cache_config
        if blocks is not None:
            config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
        cache.num_gpu_blocks = kv_blocks
        self.now_s = self.busy_s = self.online_s = self.added_s = 0.0
        self.steps = self._idle_steps = 0
        self._step_time = step_time
        self._flights: deque[_Flight] = deque()
        self._over: _Flight | None = None
        self._most_flights = config.max_concurrent_batches
        spec = FullAttentionSpec(block_size=cache.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self.scheduler: Scheduler = config.scheduler_config.get_scheduler_cls()(  # type: ignore[call-arg, assignment]
            vllm_config=config,
            kv_cache_config=KVCacheConfig(kv_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=cache.block_size,
            log_stats=True,
        )
        if blocks is not None:
            self.scheduler.kv_event_publisher = _Published(blocks)
        if isinstance(self.scheduler, ColocationScheduler):
            self.scheduler.clock = lambda: self.now_s
            self.scheduler.step_time = StepTime(experts)
        hash_fn = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        self._hasher = get_request_block_hasher(cache.block_size, hash_fn)

    @property
    def has_work(self) -> bool:
        return bool(self._flights) or self.scheduler.has_requests()

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_tokens: int,
        priority: int,
        arrival_s: float | None = None,
        payer: tuple[str, float] | None = None,
        session_id: str | None = None,
    ) -> None:
        """Queue a request.

        Args:
            arrival_s: when it came, if that was within the step that is over now.
            payer: the tenant whose it is, and its weight.
            session_id: the conversation whose turn it is.
        """
        request = self.made(request_id, prompt, max_tokens, priority, arrival_s)
        request.session_id = session_id
        if payer is not None:
            request.trace_headers = payer_headers(*payer)
        take_payer(request)
        self.add_made(request)

    def made(
        self, request_id: str, prompt: Sequence[int], max_tokens: int, priority: int, arrival_s: float | None = None
    ) -> Request:
        """A request that any engine of this kind takes; it has the hashes of its blocks."""
        return Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True),
            pooling_params=None,
            arrival_time=self.now_s if arrival_s is None else arrival_s,
            priority=priority,
            block_hasher=self._hasher,
        )

    def add_made(self, request: Request) -> None:
        """Queue it."""
        self.scheduler.add_request(request)

    def prefill_in_flight(self, at_s: float) -> float:
        """Tokens of prompts that count as computed, and are not at that time: the clock stands at a step's end."""
        flights = self._flights if self._over is None else (self._over, *self._flights)
        return sum(
            each.prefill_tokens * min(1.0, (each.end_s - at_s) / (each.end_s - each.begin_s))
            for each in flights
            if each.end_s > max(at_s, each.begin_s)
        )

    def step(self) -> list[TokenAt]:
        """Compute one step to its end, where the clock then stands; those behind it are scheduled before."""
        while len(self._flights) < self._most_flights and self.scheduler.has_requests():
            self._schedule()
        self._over = flight = self._flights.popleft()
        self.now_s = flight.end_s
        ids = list(flight.output.num_scheduled_tokens)
        self._watch(bool(ids))
        done = self.scheduler.update_from_output(
            flight.output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={one: index for index, one in enumerate(ids)},
                sampled_token_ids=flight.sampled,
            ),
        )
        return [
            TokenAt(
                each.request_id,
                self.now_s,
                each.finish_reason is not None,
                each.prefill_stats.num_cached_tokens if each.prefill_stats is not None else 0,
            )
            for outputs in done.values()
            for each in outputs.outputs
        ]

    def _schedule(self) -> None:
        output = self.scheduler.schedule()
        begin_s = max(self.now_s, self._flights[-1].end_s) if self._flights else self.now_s
        requests, rows = self.scheduler.requests, output.num_scheduled_tokens
        duration_s, prefill_tokens = 0.0, 0
        if rows:
            work = self._work(rows)
            duration_s, prefill_tokens = self._step_time(work), work.prefill_tokens
            self.steps += 1
            self.busy_s += duration_s
            if online := {one: tokens for one, tokens in rows.items() if not is_bulk(requests[one])}:
                alone_s = self._step_time(self._work(online)) if len(online) < len(rows) else duration_s
                self.online_s += alone_s
                self.added_s += duration_s - alone_s
        # As it is now: the next step may be scheduled before this one is over.
        sampled = [[] if requests[one].is_prefill_chunk else [TOKEN] for one in rows]
        self._flights.append(_Flight(output, sampled, begin_s, begin_s + duration_s, prefill_tokens))

    def _work(self, rows: Mapping[str, int]) -> StepWork:
        """Of these rows, with so many tokens each, after ``schedule``, which has counted them as computed already."""
        requests = self.scheduler.requests
        kv = pairs = 0
        for one, tokens in rows.items():
            computed = requests[one].num_computed_tokens
            kv += computed
            pairs += prefill_pairs(tokens, computed - tokens)
        return StepWork(
            prefill_tokens=sum(rows.values()) - len(rows),
            sequences=len(rows),
            kv_tokens=kv,
            prefill_pairs=pairs,
        )

    def _watch(self, computed: bool) -> None:
        self._idle_steps = 0 if computed or not self.scheduler.has_unfinished_requests() else self._idle_steps + 1
        if self._idle_steps >= _STUCK_STEPS:
            waiting = self.scheduler.get_request_counts()[1]
            raise StuckEngine(f"{waiting} requests wait, none of them runs, and none can: is the KV cache too small?")
