from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

# Its import brings all of vLLM's model runner, which warns of third parties' sins.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SEED = 11


def state(seed: int | None, tokens: int = 0) -> CachedRequestState:
    """A request as vLLM's model runner makes it, with a generator of its own if it has a seed."""
    import torch
    from vllm import SamplingParams
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    from hycluster.engine.patches.cpu_seed import patch_seeds

    patch_seeds()
    patch_seeds()
    generator = torch.Generator()
    generator.manual_seed(seed or 0)
    return CachedRequestState(
        req_id="r",
        prompt_token_ids=[1, 2],
        mm_features=[],
        sampling_params=SamplingParams(seed=seed),
        generator=generator if seed is not None else None,
        block_ids=([],),
        num_computed_tokens=0,
        output_token_ids=[0] * tokens,
    )


def draw(request: CachedRequestState) -> int:
    """As vLLM's sampler on CPU does for one token."""
    import torch

    return int(torch.randint(0, 2**31, (1,), generator=request.generator, dtype=torch.long).item())


def turn_back(request: CachedRequestState) -> None:
    """As vLLM's model runner does for a token that is thrown away."""
    assert request.generator is not None
    request.generator.set_offset(request.generator.get_offset() - 4)


def test_a_draw_that_is_thrown_away_leaves_no_trace() -> None:
    request = state(SEED)
    drawn = []
    for _ in range(5):
        for _ in range(3):
            draw(request)
            turn_back(request)
        drawn.append(draw(request))
        request.output_token_ids.append(0)
    plain = state(SEED)
    assert drawn == [draw(plain) for _ in range(5)]
    assert len(set(drawn)) == 5


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_request_that_has_tokens_goes_on_behind_them(tokens: int) -> None:
    plain = state(SEED)
    behind = [draw(plain) for _ in range(tokens + 3)][tokens:]
    request = state(SEED, tokens)
    assert [draw(request) for _ in range(3)] == behind


def test_a_request_without_a_seed_has_no_generator() -> None:
    assert state(None).generator is None


class TestUnpatched:
    """What the patch relies on; the first two fail when it is no longer needed."""

    def test_torch_still_can_not_turn_a_generator_back(self) -> None:
        import torch

        with pytest.raises(RuntimeError, match="does not use offset"):
            torch.Generator().get_offset()

    def test_vllm_turns_generators_back_and_draws_one_number_a_token(self) -> None:
        from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        assert "gen.set_offset(gen.get_offset() - 4)" in inspect.getsource(GPUModelRunner)
        drawn = inspect.getsource(TopKTopPSampler.forward_cpu)
        assert "0, 2**31, (1,), generator=gen, dtype=torch.long" in drawn

    def test_a_state_is_made_with_its_generator_and_tokens(self) -> None:
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        made = {field.name for field in dataclasses.fields(CachedRequestState)}
        assert {"generator", "sampling_params", "output_token_ids"} <= made
