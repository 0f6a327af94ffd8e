"""What vLLM computes for a list of checkpoints; run as a script, the questions on standard input as JSON.

One process for all of them: importing vLLM costs more than all the engines. The model reaches vLLM by the package's
entry point, as in anybody's vLLM.

In: ``{"prompts": [[id, ...], ...], "tokens": n, "engines": {name: {engine argument: value, ...}, ...}}``.
Out, in the file named by the first argument: ``{name: {"answers": [...], "again": [...], "kv_tokens": n, "routed":
[...]}}``, each answer with ``ids``, ``logprobs``, ``prompt_logprobs`` (of all tokens but the first) and
``cached_tokens``. ``again`` are the same prompts once more, without prompt log-probabilities, for which vLLM would not
use its prefix cache. ``routed`` is what the engine's workers hold of experts.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def answers(llm: Any, prompts: list[list[int]], tokens: int, prompt_logprobs: int | None) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0, prompt_logprobs=prompt_logprobs
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [
        {
            "ids": list(output.outputs[0].token_ids),
            "logprobs": logprobs_of(output.outputs[0].token_ids, output.outputs[0].logprobs),
            "prompt_logprobs": logprobs_of(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:]),
            "cached_tokens": output.num_cached_tokens,
        }
        for output in outputs
    ]


def logprobs_of(ids: Any, candidates: Any) -> list[float]:
    return [by_id[token].logprob for token, by_id in zip(ids, candidates, strict=False)]


def kv_tokens(llm: Any) -> int:
    """Tokens that the KV cache holds, as vLLM itself counts them."""
    cache = llm.llm_engine.vllm_config.cache_config
    return int(cache.num_gpu_blocks * cache.block_size)


def main() -> None:
    # In this process: then there is nothing to wait for but the model.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    from hycluster.engine.loaded_weights import worker_weights

    asked = json.load(sys.stdin)
    told = {}
    for name, arguments in asked["engines"].items():
        llm = LLM(**arguments)
        told[name] = {
            "answers": answers(llm, asked["prompts"], asked["tokens"], 0),
            "again": answers(llm, asked["prompts"], asked["tokens"], None),
            "kv_tokens": kv_tokens(llm),
            "routed": [each and asdict(each) for each in llm.collective_rpc(worker_weights)],
        }
        del llm
        gc.collect()
    Path(sys.argv[1]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
