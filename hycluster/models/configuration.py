"""Configuration of Tencent's Hunyuan models, as their checkpoints write it.

``model_type`` is ``hunyuan`` (Hunyuan-Large, and A13B in its first release). The same fields, read through
:class:`LayerShape`, describe what transformers knows as ``hunyuan_v1_moe`` (A13B).

Source: ``config.json`` and ``configuration_hunyuan.py`` of Tencent's published checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig


class HunyuanConfig(PreTrainedConfig):
    """``config.json`` with ``"model_type": "hunyuan"``.

    Attributes:
        num_experts, moe_topk, num_shared_expert, moe_intermediate_size: one number, or a list with one a layer.
            With one expert a layer is a plain MLP.
        intermediate_size: width of an expert (unless ``moe_intermediate_size`` is given) and of a shared one.
        use_mixed_mlp_moe: shared experts run beside the routed ones.
        use_cla, cla_share_factor: cross-layer attention; a layer ``i`` with ``i % cla_share_factor != 0`` has
            no key and value projections and reads those of layer ``i - i % cla_share_factor``.
        use_qk_norm: RMSNorm on each head of query and key, after RoPE.
        attention_head_dim: head size; None is ``hidden_size / num_attention_heads``.
        rope_parameters: what the checkpoint calls ``rope_theta`` and ``rope_scaling``.
    """

    model_type = "hunyuan"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 129024,
        hidden_size: int = 6400,
        intermediate_size: int = 18304,
        moe_intermediate_size: int | list[int] | None = None,
        num_hidden_layers: int = 64,
        num_attention_heads: int = 80,
        num_key_value_heads: int | None = None,
        attention_head_dim: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        use_qk_norm: bool = False,
        use_cla: bool = False,
        cla_share_factor: int = 1,
        num_experts: int | list[int] = 1,
        moe_topk: int | list[int] = 1,
        use_mixed_mlp_moe: bool = False,
        num_shared_expert: int | list[int] = 1,
        moe_layer_num_skipped: int = 0,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.attention_head_dim = attention_head_dim or head_dim or hidden_size // num_attention_heads
        self.head_dim = self.attention_head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        scaling = dict(rope_parameters or rope_scaling or {})
        self.rope_parameters = {
            **scaling,
            "rope_type": scaling.get("rope_type") or scaling.get("type") or "default",
            "rope_theta": scaling.get("rope_theta", rope_theta),
        }
        # transformers knows no alpha; it is checked here (``rope_of``).
        self.ignore_keys_at_rope_validation = {"alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "type"}
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.use_qk_norm = use_qk_norm
        self.use_cla = use_cla
        self.cla_share_factor = cla_share_factor
        self.num_experts = num_experts
        self.moe_topk = moe_topk
        self.use_mixed_mlp_moe = use_mixed_mlp_moe
        self.num_shared_expert = num_shared_expert
        self.moe_layer_num_skipped = moe_layer_num_skipped
        super().__init__(**kwargs, tie_word_embeddings=tie_word_embeddings)  # type: ignore[call-arg]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding of a model.

    Attributes:
        theta: base of the frequencies, before ``alpha``.
        alpha: NTK-aware scaling: the base becomes ``theta * alpha ** (d / (d - 2))``; None is no scaling.
        bfloat16_frequencies: Tencent's code without scaling keeps the inverse frequencies in bfloat16.
    """

    theta: float
    alpha: float | None
    bfloat16_frequencies: bool


def rope_of(config: Any) -> Rope:
    """The position embedding that a checkpoint was trained with.

    Raises:
        ValueError: a scaling other than none or ``dynamic`` with ``alpha``.
    """
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    theta: Any = parameters.get("rope_theta") or getattr(config, "rope_theta", 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    alpha = parameters.get("alpha")
    if kind == "default":
        return Rope(float(theta), None, bfloat16_frequencies=config.model_type == "hunyuan")
    if kind == "dynamic" and alpha:
        return Rope(float(theta), float(alpha), bfloat16_frequencies=False)
    raise ValueError(
        f"rope_scaling: type {kind!r} with alpha {alpha!r} is not supported; must be absent, or 'dynamic' with alpha"
    )


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What differs from layer to layer.

    Attributes:
        kv_layer: the layer whose keys and values this one reads; itself unless it shares.
        experts: routed experts; 1 makes the layer a plain MLP of width ``ffn``.
        top_k: experts a token.
        expert_ffn: width of a routed expert.
        shared_ffn: width of all shared experts together; 0 is none.
        ffn: width of the plain MLP.
    """

    layer: int
    kv_layer: int
    experts: int
    top_k: int
    expert_ffn: int
    shared_ffn: int
    ffn: int

    @property
    def shares_kv(self) -> bool:
        return self.kv_layer != self.layer

    @property
    def is_moe(self) -> bool:
        return self.experts > 1


def layer_shape(config: Any, layer: int) -> LayerShape:
    """Shape of one layer of a ``hunyuan`` or ``hunyuan_v1_moe`` configuration.

    Raises:
        ValueError: a list with fewer entries than layers, or more experts a token than there are.
    """

    def at(name: str, default: Any) -> int:
        value = getattr(config, name, None)
        if value is None:
            value = default
        if isinstance(value, (list, tuple)):
            if layer >= len(value):
                raise ValueError(f"{name}: has {len(value)} entries; must have one for each of the layers")
            value = value[layer]
        return int(value)

    ffn = at("intermediate_size", 0)
    experts = 1 if layer < at("moe_layer_num_skipped", 0) else at("num_experts", 1)
    top_k = at("moe_topk", 1)
    if top_k > experts > 1:
        raise ValueError(f"moe_topk: {top_k} is above num_experts ({experts}) in layer {layer}")
    # transformers' own A13B configuration has no such switch: there a shared expert is always present.
    mixed = getattr(config, "use_mixed_mlp_moe", config.model_type == "hunyuan_v1_moe")
    share = share_factor(config)
    return LayerShape(
        layer=layer,
        kv_layer=layer - layer % share,
        experts=experts,
        top_k=top_k,
        expert_ffn=at("moe_intermediate_size", ffn),
        shared_ffn=ffn * at("num_shared_expert", 1) if mixed and experts > 1 else 0,
        ffn=ffn,
    )


def share_factor(config: Any) -> int:
    """Layers that share one set of keys and values; 1 is no cross-layer attention."""
    return int(getattr(config, "cla_share_factor", 1) or 1) if getattr(config, "use_cla", False) else 1


def head_size(config: Any) -> int:
    """Size of an attention head."""
    for name in ("head_dim", "attention_head_dim"):
        if value := getattr(config, name, None):
            return int(value)
    return int(config.hidden_size) // int(config.num_attention_heads)


def has_qk_norm(config: Any) -> bool:
    """Whether query and key heads are normalized. transformers' A13B always does."""
    return bool(getattr(config, "use_qk_norm", config.model_type == "hunyuan_v1_moe"))
