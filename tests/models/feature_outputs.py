"""What vLLM's features make of tiny Hunyuan checkpoints; run as a script, one process for all but one of them.

In, as JSON on standard input: ``base``, ``merged``, ``long`` (checkpoints), ``adapter`` (a folder), ``prompts`` (ids);
or ``base``, ``draft`` (checkpoints) and ``prompts``, for speculation by a draft model alone.
Out, in the file named by the first argument: token ids by feature, and what the engines counted.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_TOKENS = 12
KV_BYTES = 1 << 26
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
OFFLOAD = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "cpu_bytes_to_use": 1 << 26,
        "spec_name": "HostOffloadingSpec",
        "spec_module_path": "hycluster.engine.patches.kv_offload",
    },
}


def tell(told: dict[str, Any], question: Callable[[Any], dict[str, Any]], model: str, **arguments: Any) -> None:
    """Ask an engine that lives as long as the question: a second one beside it would end with the first."""
    from vllm import LLM

    common: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 4,
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": KV_BYTES,
        "disable_log_stats": False,
    }
    llm = LLM(model=model, **(common | arguments))
    told |= question(llm)
    del llm
    gc.collect()


def ids(llm: Any, prompts: list[list[int]], adapters: Any = None) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(o.outputs[0].token_ids) for o in llm.generate(asked, params, lora_request=adapters, use_tqdm=False)]


def counted(llm: Any, name: str) -> float:
    return float(sum(metric.value for metric in llm.get_metrics() if metric.name == name))


def main() -> None:
    # In this process: then there is nothing to wait for but the model.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.lora.request import LoRARequest

    asked = json.load(sys.stdin)
    base, prompts = asked["base"], asked["prompts"]
    told: dict[str, Any] = {}

    def guessed(llm: Any, name: str) -> dict[str, Any]:
        return {name: ids(llm, prompts), f"{name} accepted": counted(llm, ACCEPTED)}

    if "draft" in asked:
        config = {"model": asked["draft"], "num_speculative_tokens": 3}
        tell(told, lambda llm: guessed(llm, "draft"), base, speculative_config=config)
        Path(sys.argv[1]).write_text(json.dumps(told))
        return

    def plain(llm: Any) -> dict[str, Any]:
        config = llm.llm_engine.vllm_config.cache_config
        return {
            "plain": ids(llm, prompts),
            "kv_bytes_a_token": KV_BYTES / config.num_gpu_blocks / config.block_size,
        }

    tell(told, plain, base)
    tell(told, lambda llm: {"merged": ids(llm, prompts)}, asked["merged"])

    adapter = LoRARequest("a", 1, asked["adapter"])
    some = [adapter if number % 2 else None for number in range(len(prompts))]

    def adapted(llm: Any) -> dict[str, Any]:
        asked_with = {"without adapter": None, "adapted": adapter, "mixed": some}
        return {name: ids(llm, prompts, adapters) for name, adapters in asked_with.items()}

    tell(told, adapted, base, enable_lora=True, max_lora_rank=8)

    def offloaded(llm: Any) -> dict[str, Any]:
        return {
            # One prompt at a time, so that each pushes out the one before.
            "offloaded": [[ids(llm, [prompt])[0] for prompt in prompts] for _ in range(2)],
            "stored_bytes": counted(llm, "vllm:kv_offload_store_bytes"),
            "tokens_from_host": counted(llm, "vllm:external_prefix_cache_hits"),
        }

    # 5 blocks of 128 tokens: for one prompt, not for two.
    few = int(told["kv_bytes_a_token"] * 128 * 5)
    tell(told, offloaded, base, kv_cache_memory_bytes=few, kv_transfer_config=OFFLOAD)

    chance = random.Random(0)
    long = [chance.randrange(10, 500) for _ in range(10_000)]
    lengths: dict[str, Any] = {
        "whole": {"max_num_batched_tokens": 16_384, "enable_chunked_prefill": False, "max_model_len": 16_384},
        "chunked": {"max_num_batched_tokens": 2048, "max_model_len": 262_144},
    }
    for name, arguments in lengths.items():

        def prefilled(llm: Any, name: str = name) -> dict[str, Any]:
            return {name: ids(llm, [long])}

        tell(
            told,
            prefilled,
            asked["long"],
            enable_prefix_caching=False,
            kv_cache_memory_bytes=2 * KV_BYTES,
            **arguments,
        )

    # The last one: it leaves objects that vLLM's search for its own kernels, at the start of a worker, trips over.
    tell(told, lambda llm: guessed(llm, "ngram"), base, speculative_config=NGRAM)
    Path(sys.argv[1]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
