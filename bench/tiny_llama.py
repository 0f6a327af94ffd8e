"""A 140k-parameter Llama with random weights and a byte-level tokenizer, for measuring the control plane.

Its forward pass costs next to nothing, so what a benchmark sees is everything around it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make(
    folder: Path, *, tokenizer: Path | None = None, context_tokens: int = 2048, hidden: int = 64, layers: int = 2
) -> Path:
    """Write the model to ``folder`` unless it is there; returns the folder.

    Args:
        tokenizer: a model folder whose tokenizer and chat template are taken instead.
        hidden, layers: its sizes; of heads of 32 channels.
    """
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    fast = _bytes() if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=context_tokens,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _bytes() -> Any:
    """A token a byte, and a plain chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    return fast
