"""An engine without a model: vLLM's own scheduler and KV cache manager on a virtual clock.

Which rows are in a step, with how many tokens, which blocks they hold and who is preempted is what vLLM decides, with
its own code and whichever scheduler class is configured. Only the model runner is replaced: a step takes as long as a
function of its work says, and tokens come out of nowhere. Nothing else in it knows of time, so the same trace gives
the same outcome.

Pinned to vLLM 0.32.0: it builds a scheduler as ``EngineCore.__init__`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from hycluster.engine.scheduler import ColocationScheduler
from hycluster.engine.step_time import StepWork

# What comes out; no token of a prompt that a trace's hash makes.
TOKEN = 1


@dataclass(frozen=True, slots=True)
class TokenAt:
    """One token of a request: the time at which its step was over, and whether it was the last."""

    request_id: str
    at_s: float
    last: bool


class VirtualEngine:
    """One engine; whoever calls ``step`` owns the time.

    Args:
        config: vLLM's configuration; its scheduler class is the one that is run.
        kv_blocks: how many blocks the KV cache has.
        step_time: seconds that a step of this work takes.

    Attributes:
        now_s: the virtual clock; set it to move on while the engine is idle.
    """

    def __init__(self, config: VllmConfig, kv_blocks: int, step_time: Callable[[StepWork], float]) -> None:
        cache = config.cache_config
        cache.num_gpu_blocks = kv_blocks
        self.now_s = 0.0
        self._step_time = step_time
        spec = FullAttentionSpec(block_size=cache.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self.scheduler: Scheduler = config.scheduler_config.get_scheduler_cls()(  # type: ignore[assignment]
            vllm_config=config,
            kv_cache_config=KVCacheConfig(kv_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=cache.block_size,
            log_stats=True,
        )
        if isinstance(self.scheduler, ColocationScheduler):
            self.scheduler.clock = lambda: self.now_s
        hash_fn = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        self._hasher = get_request_block_hasher(cache.block_size, hash_fn)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_requests()

    def add(self, request_id: str, prompt: Sequence[int], max_tokens: int, priority: int) -> None:
        """Queue a request that arrives now."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        self.scheduler.add_request(
            Request(
                request_id=request_id,
                prompt_token_ids=list(prompt),
                sampling_params=params,
                pooling_params=None,
                arrival_time=self.now_s,
                priority=priority,
                block_hasher=self._hasher,
            )
        )

    def step(self) -> list[TokenAt]:
        """Run one step; the clock then stands at its end."""
        output = self.scheduler.schedule()
        self.now_s += self._step_time(self._work(output))
        ids = list(output.num_scheduled_tokens)
        sampled = [[] if self.scheduler.requests[one].is_prefill_chunk else [TOKEN] for one in ids]
        done = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={one: index for index, one in enumerate(ids)},
                sampled_token_ids=sampled,
            ),
        )
        return [
            TokenAt(each.request_id, self.now_s, each.finish_reason is not None)
            for outputs in done.values()
            for each in outputs.outputs
        ]

    def _work(self, output: SchedulerOutput) -> StepWork:
        """After ``schedule``, which has counted this step's tokens as computed already."""
        rows = output.num_scheduled_tokens
        return StepWork(
            prefill_tokens=sum(rows.values()) - len(rows),
            sequences=len(rows),
            kv_tokens=sum(self.scheduler.requests[one].num_computed_tokens for one in rows),
        )
