"""The model in a real vLLM against outputs of Tencent's own code, where a folder with them is at hand.

Eager: that what is compiled gives the same, ``test_hunyuan.py`` tells.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.models.test_hunyuan import SCRIPT, TOLERANCE
from tests.models.test_hunyuan_golden_reference import GOLDEN, NAMES, recorded, without_golden
from tests.vllm_forks import VllmForks, cache_root

pytestmark = [
    pytest.mark.slow,
    without_golden,
]
WAYS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "chunked prefill": {"max_num_batched_tokens": 64, "max_num_seqs": 4},
    "tensor and expert parallel": {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "distributed_executor_backend": "mp",
    },
}
CASES = [(name, way) for way in WAYS for name in NAMES]


@pytest.fixture(scope="module")
def told(vllm_forks: VllmForks, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("golden")
    cache = cache_root(folder)
    answers: dict[str, Any] = {}
    for name in NAMES:
        prompts, _ = recorded(name)
        # One process by number of ranks: threads are bound to cores when it starts.
        for ranks in (1, 2):
            engines = {
                f"{name} {way}": {
                    "model": str(GOLDEN / name),
                    "skip_tokenizer_init": True,
                    "dtype": "float32",
                    "enforce_eager": True,
                    "max_model_len": 1024,
                    "kv_cache_memory_bytes": 2**26,
                    **arguments,
                }
                for way, arguments in WAYS.items()
                if arguments.get("tensor_parallel_size", 1) == ranks
            }
            asked = {"prompts": prompts["prompts"], "tokens": len(prompts["greedy_cache"][0]), "engines": engines}
            bound = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks))), "VLLM_CACHE_ROOT": str(cache)}
            vllm_forks.run(SCRIPT, str(folder / "told.json"), asked=json.dumps(asked), environment=bound, timeout_s=280)
            answers |= json.loads((folder / "told.json").read_text())
    return answers


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "way"), CASES)
def test_same_tokens_and_logprobs_as_tencents_code(told: Any, name: str, way: str) -> None:
    expected, arrays = recorded(name)
    for i, answer in enumerate(told[f"{name} {way}"]["answers"]):
        assert answer["ids"] == expected["greedy_cache"][i]
        assert answer["logprobs"] == pytest.approx(arrays[f"p{i}_greedy_logprobs"].tolist(), abs=TOLERANCE)
        assert answer["prompt_logprobs"] == pytest.approx(arrays[f"p{i}_prompt_logprobs"].tolist(), abs=TOLERANCE)
    # The same once more comes out of the prefix cache.
    again = told[f"{name} {way}"]["again"]
    assert again[-1]["cached_tokens"] > 0
    assert [answer["ids"] for answer in again] == expected["greedy_cache"]
