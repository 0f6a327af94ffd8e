"""Prompts and outputs as attributes of a request's span, where ``tracing.capture_content`` asks for them."""

from __future__ import annotations

import json
from typing import Any

from vllm.v1.engine.output_processor import RequestOutputCollector

from hycluster.observe.timelines import recorder
from hycluster.timeline import Timeline, current

INPUT, OUTPUT = "gen_ai.input.messages", "gen_ai.output.messages"
# Of each text; collectors refuse what is much longer.
MOST_CHARACTERS = 1 << 16


def capture(prompt: Any, collector: RequestOutputCollector, tokenizer: Any) -> None:
    """Keep what one sequence, or the ``n`` of one prompt, is asked, and what comes for them, where that is wanted."""
    timeline = current.get()
    if not recorder.captures or timeline is None or not timeline.sampled:
        return
    _add(timeline, INPUT, [_message("user", _text_of(prompt, tokenizer))])
    put, texts = collector.put, dict[int, str]()

    def kept(output: Any) -> None:
        # Before it is put: one that is not fetched in time is added to by the next.
        for each in getattr(output, "outputs", None) or () if not isinstance(output, Exception) else ():
            text = getattr(each, "text", "")
            texts[each.index] = (texts.get(each.index, "") + text) if collector.aggregate else text
        if getattr(output, "finished", False):
            _add(timeline, OUTPUT, [_message("assistant", texts[index]) for index in sorted(texts)])
        put(output)

    collector.put = kept  # type: ignore[method-assign]


def _add(timeline: Timeline, name: str, messages: list[dict[str, Any]]) -> None:
    """To what other sequences of the request have said."""
    before = json.loads(timeline.attributes.get(name, "[]"))
    timeline.attributes[name] = json.dumps([*before, *messages])


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": text[:MOST_CHARACTERS]}]}


def _text_of(prompt: Any, tokenizer: Any) -> str:
    """As it is rendered."""
    if isinstance(prompt, dict):
        if isinstance(prompt.get("prompt"), str):
            return str(prompt["prompt"])
        ids = prompt.get("prompt_token_ids")
        if ids is not None and tokenizer is not None:
            return str(tokenizer.decode(list(ids)))
    return prompt if isinstance(prompt, str) else ""
