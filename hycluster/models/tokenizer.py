"""Tencent's tokenizer for prompts: without the end-of-text token that a plain ``encode`` appends.

Hunyuan-Large's tokenizer puts ``<|startoftext|>`` before a text and ``<|endoftext|>`` after it, as its training
documents had them. A prompt that ends so asks the model to go on after the end; its chat template does not do it.
vLLM's ``/v1/completions`` (and our gRPC ingress and batch jobs) encode plainly, so the end is taken off here, for
whichever of Tencent's tokenizers a checkpoint brings.
"""

from __future__ import annotations

from typing import Any

from tokenizers.processors import TemplateProcessing
from vllm.tokenizers.hf import CachedHfTokenizer

# What Tencent's own class calls the switch, and what transformers' do.
END_SWITCHES = ("add_eod_token", "add_eos_token")


class HunyuanTokenizer:
    """The loader that vLLM calls for ``tokenizer_mode`` ``hunyuan``."""

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, **kwargs: Any) -> Any:
        """A transformers tokenizer, as vLLM's own loader gives it, that opens texts but does not end them."""
        return open_ended(CachedHfTokenizer.from_pretrained(path, *args, **kwargs))


def open_ended(tokenizer: Any) -> Any:
    """Make a tokenizer stop appending tokens to a text; what it puts before it stays."""
    for switch in END_SWITCHES:
        if getattr(tokenizer, switch, False):
            setattr(tokenizer, switch, False)
    before, after = _added(tokenizer)
    if not after:
        return tokenizer
    if tokenizer.is_fast:
        opening = [(token, tokenizer.convert_tokens_to_ids(token)) for token in tokenizer.convert_ids_to_tokens(before)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[token for token, _ in opening] + ["$A"], special_tokens=opening
        )
    else:
        # transformers' slow tokenizers ask their class, not their instance.
        tokenizer.__class__ = type(
            type(tokenizer).__name__,
            (type(tokenizer),),
            {"build_inputs_with_special_tokens": lambda self, ids, pair=None: before + ids + (pair or [])},
        )
    return tokenizer


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []
