"""How long an engine's steps take and what comes out of them: the model behind a simulated engine.

vLLM's continuous batching (priority scheduling, chunked prefill, KV blocks, preemption by
recomputation; no prefix cache) without threads and without a clock, to be stepped in virtual time.

The token at a position is a hash of all tokens before it. So a request that lost its engine and goes
on elsewhere from prompt + tokens so far gives the same output as one that was left alone.
"""

from __future__ import annotations

import bisect
import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hycluster.core import ReplicaLoad
from hycluster.engine.messages import (
    EngineCoreEvent,
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
    SamplingParams,
)
from hycluster.engine.protocol import MIGRATED
from hycluster.errors import InvalidInput
from hycluster.settings.simulated import Simulated

# Tokenizers keep special and single-byte tokens in the lowest ids; staying above them gives text
# that detokenizes, and no end of sequence by chance.
LOWEST_TOKEN = 512
# vLLM's numbers of what happens to a request.
QUEUED, SCHEDULED, PREEMPTED = 1, 2, 3


@dataclass(eq=False, slots=True)
class _Stream:
    """One request on its way.

    Attributes:
        order: who goes first: priority, arrival time, count of arrivals.
        tokens: prompt and output so far.
        computed: how many of them the KV cache holds.
        longest: at how many tokens it ends for its length.
        digest: hash of the tokens.
        prefill: how many of them were there at the last admission; the rest are decoded one by one.
        blocks: KV blocks held.
        events: that nobody has been told of.
    """

    client: int
    request_id: str
    order: tuple[int, float, int]
    params: SamplingParams
    prompt: int
    longest: int
    digest: Any
    tokens: int
    computed: int = 0
    prefill: int = 0
    blocks: int = 0
    events: list[EngineCoreEvent] = field(default_factory=list)

    @property
    def outputs(self) -> int:
        return self.tokens - self.prompt


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one engine step did.

    Attributes:
        end_s: when it is over, on the clock that ``step`` was given.
        duration_s: how long it takes; 0 if it computed nothing.
        outputs: by client, the new token of each of its requests that got one.
        prefill_tokens, decode_tokens: tokens computed.
        preempted: ids of requests that lost their KV blocks and wait again.
    """

    end_s: float
    duration_s: float
    prefill_tokens: int
    decode_tokens: int
    outputs: dict[int, list[EngineCoreOutput]] = field(default_factory=dict)
    preempted: tuple[str, ...] = ()


class SimulatedScheduler:
    """Continuous batching as vLLM does it. No threads, no clock: whoever calls ``step`` owns the time."""

    def __init__(self, settings: Simulated) -> None:
        self.settings = settings
        self.free_blocks = settings.kv_blocks
        self._arrivals = 0
        self._streams: dict[tuple[int, str], _Stream] = {}
        self._running: list[_Stream] = []
        self._waiting: list[_Stream] = []
        self._lowest_token = LOWEST_TOKEN if settings.vocab_size >= 2 * LOWEST_TOKEN else 0

    @property
    def has_work(self) -> bool:
        return bool(self._streams)

    def load(self) -> ReplicaLoad:
        used = self.settings.kv_blocks - self.free_blocks
        return ReplicaLoad(
            running=len(self._running),
            waiting=len(self._waiting),
            most_running=self.settings.max_num_seqs,
            kv_usage=used / self.settings.kv_blocks,
        )

    def add(self, client: int, request: EngineCoreRequest, now: float = 0.0) -> None:
        """Queue a request.

        Args:
            now: on the clock that ``step`` is given.

        Raises:
            InvalidInput: it asks for something that is not simulated, is too long, or its id is in use.
        """
        prompt, params = request.prompt_token_ids, request.sampling_params
        if params is None or not prompt:
            raise InvalidInput("a simulated engine only generates, from a prompt of token ids that is not empty")
        if params.logprobs is not None or params.prompt_logprobs is not None:
            raise InvalidInput("logprobs: a simulated engine has none")
        if len(prompt) >= self.settings.max_model_len:
            raise InvalidInput(f"prompt: {len(prompt)} tokens; must be below {self.settings.max_model_len}")
        if (client, request.request_id) in self._streams:
            raise InvalidInput(f"request_id: {request.request_id!r} is already in work")
        tokens = [*prompt, *(params.extra_args or {}).get(MIGRATED, ())]
        try:
            digest = hashlib.blake2b(struct.pack(f"<{len(tokens)}I", *tokens), digest_size=8)
        except struct.error:
            raise InvalidInput("prompt: token ids must be unsigned 32-bit numbers") from None
        longest = self.settings.max_model_len
        if params.max_tokens is not None:
            longest = min(longest, len(prompt) + params.max_tokens)
        self._arrivals += 1
        stream = _Stream(
            client=client,
            request_id=request.request_id,
            order=(request.priority, request.arrival_time, self._arrivals),
            params=params,
            prompt=len(prompt),
            longest=longest,
            digest=digest,
            tokens=len(tokens),
        )
        self._streams[client, request.request_id] = stream
        stream.events.append(EngineCoreEvent(QUEUED, now))
        self._wait(stream)

    def abort(self, client: int, request_ids: Sequence[str] | None = None) -> None:
        """Drop these requests of a client, or all of them, and free their KV blocks. Unknown ids are ignored."""
        if request_ids is None:
            request_ids = [request_id for owner, request_id in self._streams if owner == client]
        for request_id in request_ids:
            stream = self._streams.get((client, request_id))
            if stream is not None:
                self._drop(stream)

    def abort_all(self) -> dict[int, list[EngineCoreOutput]]:
        """Drop everything, as vLLM does when it shuts down; what each client is to be told."""
        told: dict[int, list[EngineCoreOutput]] = {}
        for stream in list(self._streams.values()):
            aborted = EngineCoreOutput(request_id=stream.request_id, new_token_ids=[], finish_reason=FinishReason.ABORT)
            told.setdefault(stream.client, []).append(aborted)
            self._drop(stream)
        return told

    def step(self, now: float) -> StepResult:
        """Run one engine step that begins at ``now`` (seconds)."""
        scheduled, preempted = self._schedule(now)
        outputs: dict[int, list[EngineCoreOutput]] = {}
        prefill_tokens = decode_tokens = kv_tokens = 0
        for stream, count in scheduled.items():
            if stream.computed < stream.prefill:
                prefill_tokens += count
            else:
                decode_tokens += count
            stream.computed += count
            kv_tokens += stream.computed
            if stream.computed == stream.tokens:
                outputs.setdefault(stream.client, []).append(self._sample(stream))
        settings = self.settings
        duration = 0.0
        if scheduled:
            duration = settings.step_base_s
            duration += settings.prefill_token_s * prefill_tokens + settings.decode_token_s * decode_tokens
            duration += settings.kv_token_s * kv_tokens
        return StepResult(
            end_s=now + duration,
            duration_s=duration,
            prefill_tokens=prefill_tokens,
            decode_tokens=decode_tokens,
            outputs=outputs,
            preempted=tuple(stream.request_id for stream in preempted),
        )

    def _schedule(self, now: float) -> tuple[dict[_Stream, int], list[_Stream]]:
        """Who computes how many tokens in this step, and who was preempted for it."""
        budget = self.settings.max_num_batched_tokens
        scheduled: dict[_Stream, int] = {}
        preempted: list[_Stream] = []
        for stream in tuple(self._running):
            if not budget:
                break
            if stream in preempted:
                continue
            count = min(stream.tokens - stream.computed, budget)
            while not self._allocate(stream, count):
                victim = max(self._running, key=_order)
                budget += scheduled.pop(victim, 0)
                self._preempt(victim)
                victim.events.append(EngineCoreEvent(PREEMPTED, now))
                preempted.append(victim)
                if victim is stream:
                    # As in vLLM, nobody after it is scheduled in this step.
                    return scheduled, preempted
            scheduled[stream] = count
            budget -= count
        # As in vLLM, a step that had to preempt admits nobody.
        while not preempted and budget and self._waiting and len(self._running) < self.settings.max_num_seqs:
            stream = self._waiting[0]
            # As in vLLM, all of it must fit, though blocks are taken chunk by chunk.
            if self._blocks(stream.tokens) > self.free_blocks:
                break
            del self._waiting[0]
            self._running.append(stream)
            stream.events.append(EngineCoreEvent(SCHEDULED, now))
            stream.prefill = stream.tokens
            scheduled[stream] = min(stream.tokens, budget)
            budget -= scheduled[stream]
            self._allocate(stream, scheduled[stream])
        return scheduled, preempted

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.settings.block_size_tokens)

    def _allocate(self, stream: _Stream, count: int) -> bool:
        """Give a stream the blocks for ``count`` more tokens; False if there are too few."""
        blocks = self._blocks(stream.computed + count) - stream.blocks
        if blocks > self.free_blocks:
            return False
        self.free_blocks -= blocks
        stream.blocks += blocks
        return True

    def _free(self, stream: _Stream) -> None:
        self.free_blocks += stream.blocks
        stream.blocks = stream.computed = 0

    def _preempt(self, stream: _Stream) -> None:
        self._running.remove(stream)
        self._free(stream)
        self._wait(stream)

    def _wait(self, stream: _Stream) -> None:
        bisect.insort(self._waiting, stream, key=_order)

    def _drop(self, stream: _Stream) -> None:
        (self._running if stream in self._running else self._waiting).remove(stream)
        self._free(stream)
        del self._streams[stream.client, stream.request_id]

    def _sample(self, stream: _Stream) -> EngineCoreOutput:
        """Append the next token to a stream, and end it where it ends."""
        params = stream.params
        held_back = params.all_stop_token_ids if stream.outputs < params.min_tokens else frozenset()
        # All are held back only in a tiny vocabulary made for a test.
        allowed = (token for token in self._candidates(stream) if token not in held_back)
        token = next(allowed, self._lowest_token)
        stream.digest.update(struct.pack("<I", token))
        stream.tokens += 1
        finish_reason = stop_reason = None
        if token == params.eos_token_id:
            finish_reason = FinishReason.STOP
        elif token in (params.stop_token_ids or ()):
            finish_reason, stop_reason = FinishReason.STOP, token
        elif stream.tokens >= stream.longest:
            finish_reason = FinishReason.LENGTH
        if finish_reason is not None:
            self._drop(stream)
        events, stream.events = stream.events, []
        return EngineCoreOutput(
            request_id=stream.request_id,
            new_token_ids=[token],
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            events=events or None,
        )

    def _candidates(self, stream: _Stream) -> Iterator[int]:
        """Possible next tokens, likeliest first."""
        span = self.settings.vocab_size - self._lowest_token
        first = int.from_bytes(stream.digest.digest(), "little")
        for index in range(span):
            yield self._lowest_token + (first + index) % span


def _order(stream: _Stream) -> tuple[int, float, int]:
    return stream.order
