from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Scheduler:
    """In the place of vLLM's: a step ends two requests by an error, one of them for its grammar."""

    def __init__(self) -> None:
        grammar = SimpleNamespace(grammar=ValueError("Rule a\nis nothing but b"))
        self.requests = {"wrong": SimpleNamespace(structured_output_request=grammar), "lost": SimpleNamespace()}
        self.grammar_compile_error_reqs = {"wrong", "aborted meanwhile"}

    def update_from_output(self, step: str) -> dict[int, Any]:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

        assert step == "a step's outputs"
        self.grammar_compile_error_reqs.clear()
        ended = [
            EngineCoreOutput(request_id=name, new_token_ids=[], finish_reason=FinishReason.ERROR)
            for name in self.requests
        ]
        return {0: EngineCoreOutputs(outputs=ended)}


def test_the_reason_is_said() -> None:
    from hycluster.engine.patches.grammar_errors import patch_reasons

    scheduler = Scheduler()
    patch_reasons(scheduler)
    reasons = {
        each.request_id: each.stop_reason for each in scheduler.update_from_output("a step's outputs")[0].outputs
    }
    assert reasons == {
        "wrong": "structured_outputs: no engine can compile it: Rule a is nothing but b",
        "lost": None,
    }
    reasons = {
        each.request_id: each.stop_reason for each in scheduler.update_from_output("a step's outputs")[0].outputs
    }
    assert set(reasons.values()) == {None}


def test_vllm_ends_them_as_it_is_taken_to() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler as Vllms

    assert "self.grammar_compile_error_reqs.clear()" in inspect.getsource(Vllms.update_from_output)
    promote = inspect.getsource(Vllms._handle_blocked_waiting_request)
    assert "isinstance(struct_output_req.grammar, Exception)" in promote
