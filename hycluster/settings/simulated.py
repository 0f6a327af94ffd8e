"""A timing model in the place of an engine."""

from __future__ import annotations

from pydantic import Field, model_validator

from hycluster.settings.base import Strict


class Simulated(Strict):
    """A timing model in the place of a real engine: for tests of control logic and for simulation only.

    One step takes ``step_base_s + prefill_token_s * prefill tokens + decode_token_s * decode tokens
    + kv_token_s * tokens of KV cache read``; ``hycluster simulate --fit`` finds these four for a real engine.
    Output tokens are a fixed function of the prompt; they mean nothing.

    Attributes:
        step_base_s: time of a step apart from its tokens.
        prefill_token_s: time that a prompt token adds.
        decode_token_s: time that an output token adds.
        kv_token_s: time that a token of KV cache adds in each step that reads it.
        max_num_seqs: most sequences in a step.
        max_num_batched_tokens: most tokens in a step.
        kv_blocks: blocks of the KV cache; where they run out, requests are preempted.
        block_size_tokens: tokens of a block.
        max_model_len: longest sequence, prompt and output together.
        vocab_size: output tokens are below it.
        realtime: each step takes as long as it would; false computes all at once.
    """

    step_base_s: float = Field(default=0.002, ge=0)
    prefill_token_s: float = Field(default=0.00002, ge=0)
    decode_token_s: float = Field(default=0.0002, ge=0)
    kv_token_s: float = Field(default=0.0, ge=0)
    max_num_seqs: int = Field(default=64, ge=1)
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    kv_blocks: int = Field(default=4096, ge=1)
    block_size_tokens: int = Field(default=16, ge=1)
    max_model_len: int = Field(default=32768, ge=2)
    vocab_size: int = Field(default=32000, ge=1, le=2**31)
    realtime: bool = True

    @model_validator(mode="after")
    def _one_fits(self) -> Simulated:
        tokens = self.kv_blocks * self.block_size_tokens
        if tokens < self.max_model_len:
            raise ValueError(
                f"kv_blocks: {self.kv_blocks} hold {tokens} tokens, fewer than max_model_len ({self.max_model_len})"
            )
        return self
