"""Tencent's Hunyuan mixture-of-experts models on vLLM's layers.

A token's way through a layer: norm, attention (RoPE first, then a norm on each head), norm, experts. Two things
are Hunyuan-Large's own:

- Cross-layer attention (CLA). Layers come in groups of ``cla_share_factor``; the first projects keys and values,
  the others read them. Tencent shares the *projections*, and each layer applies its own key norm, so the finished
  key of one layer is not the key of the next. What can be shared exactly is the rotated, normalized key without
  the norm's weight; each layer's key norm weight goes into its query norm (``fold_key_norms``). The cache then
  holds one key and one value a group, and the other layers allocate nothing.
- Top-1 routing weighs the expert by its raw softmax probability; with more experts a token the weights are
  renormalized. The gate works in float32.

Sources: arXiv 2411.02265; Tencent's published modeling code (commit cdc3735) for the order of operations.
Written against vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, cast

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import get_ep_group, get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import MixtureOfExperts, SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from hycluster.models.configuration import LayerShape, has_qk_norm, head_size, layer_shape, rope_of, share_factor
from hycluster.models.hunyuan_weights import fold_key_norms, separate
from hycluster.models.rope import rotary_embedding
from hycluster.models.routing import router, routing_settings


class HunyuanMLP(nn.Module):
    """SiLU-gated MLP: a dense layer's, or the shared experts of a sparse one."""

    def __init__(
        self,
        config: Any,
        width: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act: {config.hidden_act!r} is not supported; must be 'silu'")
        bias = bool(getattr(config, "mlp_bias", False))
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [width] * 2, bias=bias, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            width,
            config.hidden_size,
            bias=bias,
            quant_config=quant_config,
            reduce_results=reduce_results,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = SiluAndMul()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(hidden)
        output: torch.Tensor = self.down_proj(self.act_fn(gate_up))[0]
        return output


class HunyuanMoE(nn.Module):
    """Routed experts and, beside them, the shared ones."""

    def __init__(self, config: Any, shape: LayerShape, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        parallel = get_current_vllm_config().parallel_config
        self.n_logical_experts = shape.experts
        self.n_redundant_experts = parallel.eplb_config.num_redundant_experts
        self.n_physical_experts = self.n_logical_experts + self.n_redundant_experts
        self.n_local_physical_experts = self.n_physical_experts // get_ep_group().device_group.size()
        self.gate = GateLinear(
            config.hidden_size,
            shape.experts,
            bias=False,
            out_dtype=torch.float32,
            params_dtype=torch.float32,
            prefix=f"{prefix}.gate",
        )
        self.shared_mlp = (
            HunyuanMLP(config, shape.shared_ffn, quant_config, f"{prefix}.shared_mlp", reduce_results=False)
            if shape.shared_ffn
            else None
        )
        self.experts = FusedMoEFactory(
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden_size=config.hidden_size,
            intermediate_size=shape.expert_ffn,
            renormalize=shape.top_k > 1,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
            enable_eplb=parallel.enable_eplb,
            num_redundant_experts=self.n_redundant_experts,
            shared_experts=self.shared_mlp,
            custom_routing_function=router(
                shape.experts,
                shape.top_k,
                shape.layer,
                routing_settings(get_current_vllm_config().additional_config),
            ),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.view(-1, hidden.shape[-1])
        router_logits, _ = self.gate(tokens)
        output: torch.Tensor = self.experts(hidden_states=tokens, router_logits=router_logits)
        return output.view(hidden.shape)


class HunyuanAttention(nn.Module):
    """Attention of one layer, with keys and values of its own or of the first layer of its group."""

    def __init__(
        self,
        config: Any,
        shape: LayerShape,
        rotary_emb: RotaryEmbedding,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, head_size(config)
        ranks = get_tensor_model_parallel_world_size()
        if heads % ranks or max(kv_heads, ranks) % min(kv_heads, ranks):
            raise ValueError(
                f"tensor parallel size: {ranks} does not divide {heads} query heads, or {kv_heads} KV heads"
                " neither divide it nor are divided by it"
            )
        self.heads, self.kv_heads, self.head_size = heads // ranks, max(1, kv_heads // ranks), size
        self.shares_kv = shape.shares_kv
        bias = bool(getattr(config, "attention_bias", False))
        if self.shares_kv:
            self.q_proj = ColumnParallelLinear(
                config.hidden_size, heads * size, bias=bias, quant_config=quant_config, prefix=f"{prefix}.q_proj"
            )
        else:
            self.qkv_proj = QKVParallelLinear(
                config.hidden_size,
                size,
                heads,
                kv_heads,
                bias=bias,
                quant_config=quant_config,
                prefix=f"{prefix}.qkv_proj",
            )
        self.o_proj = RowParallelLinear(
            heads * size, config.hidden_size, bias=bias, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.rotary_emb = rotary_emb
        self.qk_norm = has_qk_norm(config)
        if self.qk_norm:
            # Carries this layer's query and key norm weights; see fold_key_norms.
            self.q_norm = RMSNorm(size, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(size, eps=config.rms_norm_eps, has_weight=False)
        source = prefix.replace(f".{shape.layer}.", f".{shape.kv_layer}.") if self.shares_kv else None
        self.attn = Attention(
            self.heads,
            size,
            size**-0.5,
            num_kv_heads=self.kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            kv_sharing_target_layer_name=f"{source}.attn" if source else None,
        )

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        key: torch.Tensor | None = None
        value: torch.Tensor | None = None
        if self.shares_kv:
            query, _ = self.q_proj(hidden)
        else:
            qkv, _ = self.qkv_proj(hidden)
            kv_size = self.kv_heads * self.head_size
            query, key, value = qkv.split([self.heads * self.head_size, kv_size, kv_size], dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        if self.qk_norm:
            query = self._by_head(self.q_norm, query)
            if key is not None:
                key = self._by_head(self.k_norm, key)
        output: torch.Tensor = self.o_proj(self.attn(query, key, value))[0]
        return output

    def _by_head(self, norm: RMSNorm, heads: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = norm(heads.reshape(*heads.shape[:-1], -1, self.head_size))
        return normed.view(heads.shape)


class HunyuanDecoderLayer(nn.Module):
    """Attention and experts, each behind a norm and beside a residual."""

    def __init__(
        self,
        config: Any,
        rotary_emb: RotaryEmbedding,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        shape = layer_shape(config, int(prefix.rsplit(".", 1)[-1]))
        self.self_attn = HunyuanAttention(
            config, shape, rotary_emb, cache_config, quant_config, prefix=f"{prefix}.self_attn"
        )
        self.mlp = (
            HunyuanMoE(config, shape, quant_config, prefix=f"{prefix}.mlp")
            if shape.is_moe
            else HunyuanMLP(config, shape.ffn, quant_config, prefix=f"{prefix}.mlp")
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions, hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class HunyuanModel(nn.Module):
    """Embedding, this pipeline stage's layers, final norm."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={".mlp.gate.wg.": ".mlp.gate."},
        orig_to_new_suffix={
            # Calibrated on keys with their norm's weight; the cache holds keys without, of unit mean square,
            # which an FP8 cache holds well without a scale.
            ".k_scale": None,
            ".kv_scale": None,
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.quant_config = vllm_config.quant_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        rotary_emb = rotary_embedding(rope_of(config), head_size(config), config.max_position_embeddings)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: HunyuanDecoderLayer(
                config, rotary_emb, vllm_config.cache_config, vllm_config.quant_config, prefix
            ),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        residual: torch.Tensor | None = None
        if intermediate_tensors is None:
            hidden = inputs_embeds if inputs_embeds is not None else self.embed_input_ids(cast(torch.Tensor, input_ids))
        else:
            hidden, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden, residual = layer(positions, hidden, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden, "residual": cast(torch.Tensor, residual)})
        output: torch.Tensor = self.norm(hidden, residual)[0]
        return output

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        # A layer that shares keys and values has a query projection only; the others' go into one matrix.
        stacked: dict[str, tuple[str, str | int]] = {
            f"layers.{layer}.self_attn.{part}_proj.": (f"layers.{layer}.self_attn.qkv_proj.", part)
            for layer in range(0, self.config.num_hidden_layers, share_factor(self.config))
            for part in "qkv"
        }
        # A routed expert's projections are packed by vLLM's own expert loader.
        for mlp in ("mlp.shared_mlp", "mlp"):
            stacked |= {
                f".{mlp}.gate_proj.": (f".{mlp}.gate_up_proj.", 0),
                f".{mlp}.up_proj.": (f".{mlp}.gate_up_proj.", 1),
            }
        mapper = self.hf_to_vllm_mapper | WeightsMapper(orig_to_new_stacked=stacked)
        weights = separate(weights, self.config)
        if has_qk_norm(self.config):
            weights = fold_key_norms(weights, self.norm.weight.dtype)
        return AutoWeightsLoader(self).load_weights(weights, mapper=mapper)


class HunyuanForCausalLM(nn.Module, SupportsLoRA, SupportsPP, MixtureOfExperts):
    """Hunyuan-Large (``HunYuanForCausalLM``) and A13B (``HunYuanMoEV1ForCausalLM``).

    What can't be right is refused before, in ``hycluster/models/verify.py``.
    """

    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}  # noqa: RUF012

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.quant_config = vllm_config.quant_config
        self.model = HunyuanModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self._set_expert_counts()

    def _moes(self) -> list[HunyuanMoE]:
        layers = (layer for layer in self.model.layers if not isinstance(layer, PPMissingLayer))
        return [layer.mlp for layer in layers if isinstance(layer.mlp, HunyuanMoE)]

    def _set_expert_counts(self) -> None:
        """What vLLM's expert load balancer asks of a model (``MixtureOfExperts``)."""
        moes = self._moes()
        self.expert_weights = []
        self.moe_layers = [moe.experts for moe in moes]
        self.num_moe_layers = len(moes)
        self.num_expert_groups = 1
        self.num_shared_experts = 0
        first = moes[0] if moes else None
        self.num_logical_experts = self.num_routed_experts = first.n_logical_experts if first else 0
        self.num_physical_experts = first.n_physical_experts if first else 0
        self.num_local_physical_experts = first.n_local_physical_experts if first else 0
        self.num_redundant_experts = first.n_redundant_experts if first else 0

    def update_physical_experts_metadata(self, num_physical_experts: int, num_local_physical_experts: int) -> None:
        """Called by vLLM when it changes the number of expert replicas (elastic expert parallel)."""
        self.num_physical_experts = num_physical_experts
        self.num_local_physical_experts = num_local_physical_experts
        self.num_redundant_experts = num_physical_experts - self.num_logical_experts
        for moe in self._moes():
            moe.n_physical_experts = num_physical_experts
            moe.n_local_physical_experts = num_local_physical_experts
            moe.n_redundant_experts = self.num_redundant_experts
            moe.experts.update_expert_map()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        output: torch.Tensor | IntermediateTensors = self.model(
            input_ids, positions, intermediate_tensors, inputs_embeds
        )
        return output

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits: torch.Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)
