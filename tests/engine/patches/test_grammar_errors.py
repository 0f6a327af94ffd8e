from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def asking(name: str, allowed: list[int]) -> Any:
    grammar = SimpleNamespace(fill_bitmask=lambda bitmask, row: bitmask[row].copy_(torch.tensor(allowed)))
    return SimpleNamespace(request_id=name, structured_output_request=SimpleNamespace(grammar=grammar))


class Manager:
    """In the place of vLLM's: rejects all."""

    backend = SimpleNamespace(allocate_token_bitmask=lambda rows: torch.full((rows, 2), -1))

    def accept_tokens(self, _request: Any, _tokens: list[int]) -> bool:
        return False


class Scheduler:
    """In the place of vLLM's: a step ends all requests by an error."""

    def __init__(self) -> None:
        grammar = SimpleNamespace(grammar=ValueError("Rule a\nis nothing but b"))
        self.requests = {"wrong": SimpleNamespace(structured_output_request=grammar), "lost": SimpleNamespace()}
        self.requests |= {"stuck": asking("stuck", [0, 0]), "rejected": asking("rejected", [0, 4])}
        self.grammar_compile_error_reqs = {"wrong", "aborted meanwhile"}
        self.structured_output_manager = Manager()

    def update_from_output(self, step: str) -> dict[int, Any]:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

        assert step == "a step's outputs"
        self.grammar_compile_error_reqs.clear()
        for name in ("stuck", "rejected"):
            assert not self.structured_output_manager.accept_tokens(self.requests[name], [1])
        ended = [
            EngineCoreOutput(request_id=name, new_token_ids=[], finish_reason=FinishReason.ERROR)
            for name in self.requests
        ]
        return {0: EngineCoreOutputs(outputs=ended)}


def test_the_reason_is_said() -> None:
    from hycluster.engine.patches.grammar_errors import NOTHING, patch_reasons

    scheduler = Scheduler()
    patch_reasons(scheduler)

    def reasons() -> dict[str, Any]:
        (step,) = scheduler.update_from_output("a step's outputs").values()
        return {each.request_id: each.stop_reason for each in step.outputs}

    assert reasons() == {
        "wrong": "structured_outputs: no engine can compile it: Rule a is nothing but b",
        "lost": None,
        "stuck": NOTHING,
        # Where others are allowed, it is not the caller's fault.
        "rejected": None,
    }
    for name in ("stuck", "rejected"):
        scheduler.requests[name] = asking(name, [1, 1])
    assert set(reasons().values()) == {None}


def test_vllm_ends_them_as_it_is_taken_to() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler as Vllms

    assert "self.grammar_compile_error_reqs.clear()" in inspect.getsource(Vllms.update_from_output)
    promote = inspect.getsource(Vllms._handle_blocked_waiting_request)
    assert "isinstance(struct_output_req.grammar, Exception)" in promote
    assert "not self.structured_output_manager.accept_tokens(" in inspect.getsource(Vllms.update_from_output)
