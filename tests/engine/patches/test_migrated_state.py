from __future__ import annotations

import inspect
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def state(output: list[int]) -> Any:
    """A request's state as vLLM's model runner makes it for a request that brought 5 and 6 along."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    params = SamplingParams(extra_args={"brought": [5, 6]})
    return CachedRequestState(
        req_id="r", prompt_token_ids=[1, 2], mm_features=[], sampling_params=params, generator=None, block_ids=([],),
        num_computed_tokens=0, output_token_ids=output,
    )  # fmt: skip


@pytest.fixture
def _patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's own with this patch alone, whatever an engine of another test has made of it."""
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    from hycluster.engine.patches.migrated_state import patch_states

    own: Any = inspect.unwrap(CachedRequestState.__post_init__)
    monkeypatch.setattr(CachedRequestState, "__post_init__", own)
    for _ in range(2):
        patch_states(None, lambda params: (params.extra_args or {}).get("brought", ()) if params else ())


@pytest.mark.usefixtures("_patched")
def test_a_state_begins_with_what_the_request_has() -> None:
    assert state([]).output_token_ids == [5, 6]
    assert state([8]).output_token_ids == [8]


def test_vllms_own_still_begins_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_input_batch import CachedRequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    own: Any = inspect.unwrap(CachedRequestState.__post_init__)
    monkeypatch.setattr(CachedRequestState, "__post_init__", own)
    assert state([]).output_token_ids == []
    made = inspect.getsource(GPUModelRunner._update_states)
    assert "CachedRequestState(" in made
    assert "output_token_ids=[]" in made
