from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]


@pytest.mark.parametrize(
    ("prompt", "n", "sequences"),
    [
        ("one", None, 1),
        ("one", 3, 3),
        (["one", "two"], None, 2),
        (["one", "two"], 3, 6),
        ([1, 2, 3], 2, 2),
        ([[1, 2], [3]], 2, 4),
        ([], 2, 2),
        (None, 2, 2),
    ],
)
async def test_each_prompt_counts(prompt: Any, n: int | None, sequences: int) -> None:
    from hycluster.engine.patches.completion_prompts import patch_completions

    async def create_completion(request: Any, raw: str) -> str:
        return f"{raw} answered"

    async def check_model(_: Any) -> None: ...

    asked: list[int] = []
    handler = SimpleNamespace(create_completion=create_completion, _check_model=check_model)
    patch_completions(handler, asked.append)
    request: Any = SimpleNamespace(prompt=prompt, n=n)
    assert await handler.create_completion(request, "raw") == "raw answered"
    assert asked == [sequences]


async def test_a_model_that_there_is_not_comes_first() -> None:
    from hycluster.engine.patches.completion_prompts import patch_completions

    async def check_model(_: Any) -> str:
        return "no such model"

    asked: list[int] = []
    handler: Any = SimpleNamespace(create_completion=check_model, _check_model=check_model)
    patch_completions(handler, asked.append)
    assert await handler.create_completion(SimpleNamespace(prompt="x", n=1)) == "no such model"
    assert not asked


def test_vllms_own_still_counts_n_alone() -> None:
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    assert "self.engine_client.check_admission(n)" in inspect.getsource(GenerateBaseServing._preflight)
    asked = inspect.getsource(OpenAIServingCompletion)
    assert asked.count("self._preflight(request.n or 1)") == 1
    assert "check_admission" not in asked
