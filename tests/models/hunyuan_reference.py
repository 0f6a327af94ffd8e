"""Hunyuan-Large in plain torch, float32: what the engine's model is measured against.

Written from the paper (arXiv 2411.02265) and the behaviour of Tencent's published model, with none of the code under
test. A whole sequence at once, no KV cache. Weights are a state dict in Tencent's separate layout; the config is the
dict of config.json. Each ``mutation`` is a plausible mistake, so that a test can show that it would notice it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

Mutation = Literal["shared_finished_key", "norm_before_rope", "renormalized_top1", "no_alpha", "float32_rope"]
MUTATIONS: tuple[Mutation, ...] = get_args(Mutation)


def at_layer(value: Any, layer: int) -> Any:
    """A setting that is either one for all layers or a list with one for each."""
    return value[layer] if isinstance(value, list) else value


@dataclass(frozen=True)
class Reference:
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    mutation: Mutation | None = None

    @classmethod
    def load(cls, folder: Path, mutation: Mutation | None = None) -> Reference:
        """From a checkpoint folder with safetensors files in the separate layout."""
        from safetensors.torch import load_file

        weights = {
            name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
        }
        config = json.loads((folder / "config.json").read_text())
        return cls(config, {name: tensor.float() for name, tensor in weights.items()}, mutation)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        """[tokens] -> [tokens, vocab]."""
        embeddings = self.weights["model.embed_tokens.weight"]
        hidden = embeddings[torch.tensor(ids)]
        cos, sin = self._rope(len(ids))
        shared: tuple[Tensor, Tensor] | None = None
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            attended, shared = self._attention(layer, self._norm(hidden, f"{name}.input_layernorm"), cos, sin, shared)
            hidden = hidden + attended
            hidden = hidden + self._feed_forward(layer, self._norm(hidden, f"{name}.post_attention_layernorm"))
        head = embeddings if self.config["tie_word_embeddings"] else self.weights["lm_head.weight"]
        return self._norm(hidden, "model.norm") @ head.T

    def prompt_logprobs(self, ids: list[int]) -> list[float]:
        """Natural log of p(ids[i] | ids[:i]) for i from 1 on: len(ids) - 1 values."""
        chosen = torch.tensor(ids[1:], dtype=torch.int64)[:, None]
        return self.logits(ids)[:-1].log_softmax(-1).gather(-1, chosen)[:, 0].tolist()

    def greedy(self, ids: list[int], tokens: int) -> tuple[list[int], list[float], float]:
        """The next ``tokens`` ids, their log-probabilities, and the smallest gap between best and second-best logit."""
        sequence, logprobs, gap = list(ids), [], math.inf
        for _ in range(tokens):
            last = self.logits(sequence)[-1]
            (best, second), (token, _) = (pair.tolist() for pair in last.topk(2))
            gap = min(gap, best - second)
            sequence.append(token)
            logprobs.append(last.log_softmax(-1)[token].item())
        return sequence[len(ids) :], logprobs, gap

    @property
    def _head_size(self) -> int:
        size = self.config.get("attention_head_dim") or self.config.get("head_dim")
        return int(size or self.config["hidden_size"] // self.config["num_attention_heads"])

    def _linear(self, hidden: Tensor, name: str) -> Tensor:
        return functional.linear(hidden, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        mean_square = hidden.pow(2).mean(-1, keepdim=True)
        return self.weights[f"{name}.weight"] * hidden * torch.rsqrt(mean_square + self.config["rms_norm_eps"])

    def _rope(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [tokens, head size]."""
        size, base = self._head_size, float(self.config.get("rope_theta", 10_000.0))
        scaling = self.config.get("rope_scaling")
        alpha = scaling.get("alpha") if scaling else None
        if alpha and self.mutation != "no_alpha":
            base *= alpha ** (size / (size - 2))
        frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        if not scaling and self.config["model_type"] == "hunyuan" and self.mutation != "float32_rope":
            # Tencent's code for Hunyuan-Large keeps them in bfloat16, but only where there is no scaling.
            frequencies = frequencies.bfloat16().float()
        angles = torch.outer(torch.arange(tokens, dtype=torch.float32), frequencies).repeat(1, 2)
        return angles.cos(), angles.sin()

    def _attention(
        self, layer: int, hidden: Tensor, cos: Tensor, sin: Tensor, shared: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attention's output [tokens, hidden], and the K and V that later layers of the group share."""
        name, size = f"model.layers.{layer}.self_attn", self._head_size
        share = self.config["cla_share_factor"] if self.config.get("use_cla") else 1

        def heads(projection: str) -> Tensor:
            """[heads, tokens, head size]."""
            return self._linear(hidden, f"{name}.{projection}").view(len(hidden), -1, size).transpose(0, 1)

        def positioned(states: Tensor, norm: str) -> Tensor:
            def rotated(states: Tensor) -> Tensor:
                first, second = states.chunk(2, dim=-1)
                return states * cos + torch.cat((-second, first), dim=-1) * sin

            def normed(states: Tensor) -> Tensor:
                return self._norm(states, f"{name}.{norm}") if self.config.get("use_qk_norm", True) else states

            return rotated(normed(states)) if self.mutation == "norm_before_rope" else normed(rotated(states))

        query = positioned(heads("q_proj"), "query_layernorm")
        is_source = layer % share == 0
        key, value = (heads("k_proj"), heads("v_proj")) if is_source or shared is None else shared
        raw_key = key
        if is_source or self.mutation != "shared_finished_key":
            key = positioned(key, "key_layernorm")
        attended = functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, enable_gqa=True
        )[0]
        output = self._linear(attended.transpose(0, 1).flatten(1), f"{name}.o_proj")
        return output, (key if self.mutation == "shared_finished_key" else raw_key, value)

    def _mlp(self, hidden: Tensor, name: str) -> Tensor:
        gate, up = self._linear(hidden, f"{name}.gate_proj"), self._linear(hidden, f"{name}.up_proj")
        return self._linear(functional.silu(gate) * up, f"{name}.down_proj")

    def _feed_forward(self, layer: int, hidden: Tensor) -> Tensor:
        name = f"model.layers.{layer}.mlp"
        experts = at_layer(self.config["num_experts"], layer)
        if experts == 1:
            return self._mlp(hidden, name)
        topk = at_layer(self.config["moe_topk"], layer)
        probabilities, chosen = self._linear(hidden, f"{name}.gate.wg").softmax(-1).topk(topk)
        if topk > 1 or self.mutation == "renormalized_top1":
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        output = torch.zeros_like(hidden)
        for expert in range(experts):
            token, rank = (chosen == expert).nonzero(as_tuple=True)
            if len(token):
                weighted = probabilities[token, rank, None] * self._mlp(hidden[token], f"{name}.experts.{expert}")
                output.index_add_(0, token, weighted)
        if self.config.get("use_mixed_mlp_moe"):
            output = output + self._mlp(hidden, f"{name}.shared_mlp")
        return output
