"""What ``hycluster/engine/scheduler.py`` relies on in vLLM 0.32.0's scheduler, by its source. When one of these fails
after an upgrade, read it beside ``Scheduler.schedule``; ``tests/engine/test_scheduler.py`` then says what it does."""

from __future__ import annotations

import inspect

import pytest

pytestmark = pytest.mark.usefixtures("vllm_imported")


def schedule() -> str:
    from vllm.v1.core.sched.scheduler import Scheduler

    return inspect.getsource(Scheduler.schedule)


def in_order(source: str, *parts: str) -> None:
    at = 0
    for part in parts:
        found = source.find(part, at)
        assert found >= 0, f"not there, or not in this order: {part}"
        at = found + len(part)


def test_a_row_is_asked_for_last_and_then_gets_its_blocks() -> None:
    in_order(
        schedule(),
        "while req_index < len(self.running) and token_budget > 0:",
        "num_new_tokens = self._reserve_prefill_lookahead(",
        "if num_new_tokens == 0:",
        "continue",
        "self.kv_cache_manager.allocate_slots(",
        "if not preempted_reqs and",
        "num_new_tokens = self._reserve_prefill_lookahead(",
        "if num_new_tokens == 0:",
        "break",
        "self.kv_cache_manager.allocate_slots(",
        "if new_blocks is None:",
        "break",
    )
    for once_each in ("self._reserve_prefill_lookahead(", "self.kv_cache_manager.allocate_slots("):
        assert schedule().count(once_each) == 2


def test_who_is_admitted() -> None:
    in_order(
        schedule(),
        "request_queue = self.kv_holding_waiting",
        "if not request_queue and",
        "request_queue = self.waiting",
        "if not request_queue or",
        "len(self.running) + self.num_waiting_for_streaming_input",
        ">= self.max_num_active_reqs",
        "request_queue.peek_request()",
    )


def test_adapters_count_by_step() -> None:
    in_order(
        schedule(),
        "for req in scheduled_running_reqs",
        "assert len(scheduled_loras) <= self.lora_config.max_loras",
    )


def test_a_row_that_was_left_out_of_a_step_is_taken_up_again() -> None:
    """The scheduler then tells all of its tokens, and the model runner has kept the rest."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    in_order(
        inspect.getsource(Scheduler._make_cached_request_data),
        "if req_id not in self.prev_step_scheduled_req_ids:",
        "all_token_ids[req_id] = req.all_token_ids.copy()",
    )
    in_order(
        inspect.getsource(GPUModelRunner._update_states),
        "unscheduled_req_ids = cached_req_ids - (scheduled_req_ids - resumed_req_ids)",
        "self.input_batch.remove_request(req_id)",
        "if req_index is None:",
        "reqs_to_add.append(req_state)",
    )


def test_a_row_may_be_preempted_between_two_steps() -> None:
    """As when the prefix cache is reset; what is in flight for it drains."""
    from vllm.v1.core.sched.scheduler import Scheduler

    in_order(inspect.getsource(Scheduler.reset_prefix_cache), "self.running.pop()", "self._preempt_request(request,")
    preempting = inspect.getsource(Scheduler._preempt_request)
    for what in (
        "popped from the running queue",
        "self._free_request_blocks(request)",
        "self.waiting.prepend_request(",
    ):
        assert what in preempting


def test_a_step_ends_with_what_it_began_with() -> None:
    from vllm.v1.engine.core import EngineCore

    for step in (EngineCore.step, EngineCore.step_with_batch_queue):
        in_order(
            inspect.getsource(step), "scheduler_output = self.scheduler.schedule(", "self.scheduler.update_from_output("
        )


def test_a_class_is_taken_for_a_scheduler() -> None:
    from vllm.config import SchedulerConfig

    assert 'return cast(type["SchedulerInterface"], self.scheduler_cls)' in inspect.getsource(
        SchedulerConfig.get_scheduler_cls
    )


def test_the_queue_is_a_heap_by_priority() -> None:
    from vllm.v1.core.sched.request_queue import PriorityRequestQueue
    from vllm.v1.request import Request

    assert "self._heap[0]" in inspect.getsource(PriorityRequestQueue.peek_request)
    in_order(inspect.getsource(Request.__lt__), "self.priority", "self.arrival_time")


def test_who_was_peeked_at_is_popped() -> None:
    """Whoever came into the queue in between: rows that are given up for it."""
    in_order(
        schedule(),
        "request = request_queue.peek_request()",
        "self.kv_cache_manager.allocate_slots(",
        "request = request_queue.pop_request()",
        "self.running.append(request)",
    )
    in_order(schedule(), "def skip_request(", "from_queue.pop_request()")
    assert schedule().count("pop_request()") == 2


def test_blocks_are_asked_for_by_these_names() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    parameters = list(inspect.signature(KVCacheManager.allocate_slots).parameters)
    assert parameters[1:4] == ["request", "num_new_tokens", "num_new_computed_tokens"]
    assert "num_external_computed_tokens" in parameters
