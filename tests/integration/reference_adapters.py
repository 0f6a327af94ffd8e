"""What plain ``vllm.LLM`` answers greedily to chats and prompts with each adapter and without; run as a script."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.load(sys.stdin)
    llm = LLM(
        model=asked["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        kv_cache_memory_bytes=1 << 27,
        enable_lora=True,
        max_loras=len(asked["adapters"]),
        max_lora_rank=8,
    )
    params = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True)
    chat_params = SamplingParams(temperature=0, max_tokens=asked["max_tokens"])
    conversations: list[Any] = [[{"role": "user", "content": prompt}] for prompt in asked["prompts"]]
    kept: dict[str, Any] = {}
    names = [asked["base"], *asked["adapters"]]
    for number, name in enumerate(names):
        adapter = LoRARequest(name, number, asked["adapters"][name]) if number else None
        prompts = llm.generate(asked["prompts"], params, lora_request=adapter)
        chats = llm.chat(conversations, chat_params, lora_request=adapter)
        kept[name] = {
            "ids": [list(output.outputs[0].token_ids) for output in prompts],
            "chats": [output.outputs[0].text for output in chats],
        }
    Path(sys.argv[1]).write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
