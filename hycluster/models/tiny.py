"""A tiny random checkpoint in Tencent's Hugging Face layout: the Hunyuan way without the weights.

Its shapes are small; everything else is as in the real ones, tokenizer and chat template included. The weights are
drawn so that a wrong model shows: wide gaps between best and second-best token, experts that differ, norms that are
not one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hycluster.errors import InvalidInput, shown
from hycluster.models.tiny_tokenizer import SMALLEST_VOCABULARY, build_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = {
    # name: (architectures, model_type)
    "hunyuan-large": ("HunYuanForCausalLM", "hunyuan"),
    "hunyuan-a13b": ("HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe"),
}
LAYOUTS = ("separate", "fused")
FORMATS = ("safetensors", "bin")
DTYPES = ("bfloat16", "float32", "fp8")
# What vLLM 0.32's attention takes on a CPU.
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyShape:
    """What the model looks like. Sizes are counts of channels, heads, layers, experts, tokens.

    Attributes:
        intermediate: FFN width of one expert, and of one shared expert.
        experts: routed experts a layer; 1 makes every layer a plain MLP.
        shared_experts: 0 is none.
        head_size: None is ``hidden / heads``.
        cla: cross-layer attention: ``cla_share_factor`` layers in a row read the keys and values of their first.
        rope_alpha: 0 is no scaling.
        seed: of the weights.

    Raises:
        InvalidInput: names the field, the value and what is allowed.
    """

    architecture: str = "hunyuan-large"
    layers: int = 8
    hidden: int = 128
    intermediate: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_size: int | None = None
    experts: int = 8
    topk: int = 1
    shared_experts: int = 1
    vocabulary: int = 512
    context_tokens: int = 2048
    cla: bool = True
    cla_share_factor: int = 2
    rope_alpha: float = 1000.0
    attention_bias: bool = False
    tied_embeddings: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise InvalidInput(f"{name}: {shown(getattr(self, name))} is not allowed; must be {allowed}")

        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "experts", "topk", "context_tokens"):
            check(name, getattr(self, name) >= 1, "at least 1")
        check("architecture", self.architecture in ARCHITECTURES, f"one of {', '.join(ARCHITECTURES)}")
        check("heads", self.heads % self.kv_heads == 0, f"a multiple of kv_heads ({self.kv_heads})")
        if self.head_size is None:
            check("hidden", self.hidden % self.heads == 0, f"a multiple of heads ({self.heads}), or head_size set")
        if self.head_channels not in HEAD_SIZES:
            raise InvalidInput(
                f"head_size: {self.head_channels} is not allowed; must be one of {', '.join(map(str, HEAD_SIZES))}"
            )
        check("topk", self.topk <= self.experts, f"at most experts ({self.experts})")
        check("shared_experts", self.shared_experts >= 0, "at least 0")
        check("vocabulary", self.vocabulary >= SMALLEST_VOCABULARY, f"at least {SMALLEST_VOCABULARY}")
        check("rope_alpha", self.rope_alpha == 0 or self.rope_alpha > 1, "0 (no scaling) or above 1")
        check("seed", 0 <= self.seed < 2**63, "from 0 to 2**63 - 1")
        if self.architecture == "hunyuan-a13b":
            check("cla", not self.cla, "off: hunyuan-a13b has no cross-layer attention")
        if self.cla:
            check("cla_share_factor", self.cla_share_factor >= 2, "at least 2; for no sharing turn cla off")

    @property
    def head_channels(self) -> int:
        return self.head_size or self.hidden // self.heads

    def has_own_kv(self, layer: int) -> bool:
        """Whether the layer projects keys and values itself."""
        return not self.cla or layer % self.cla_share_factor == 0


def config_of(shape: TinyShape) -> dict[str, Any]:
    """config.json of the checkpoint, with Tencent's field names."""
    architecture, model_type = ARCHITECTURES[shape.architecture]
    tokenizer = build_tokenizer(shape.vocabulary)
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context_tokens,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": shape.attention_bias,
        "use_qk_norm": True,
        "use_mixed_mlp_moe": shape.shared_experts > 0,
        "num_experts": shape.experts,
        "moe_topk": shape.topk,
        "num_shared_expert": shape.shared_experts,
        "tie_word_embeddings": shape.tied_embeddings,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|eos|>"),
    }
    if shape.rope_alpha:
        config["rope_scaling"] = {"type": "dynamic", "alpha": float(shape.rope_alpha), "factor": 1.0}
    if shape.architecture == "hunyuan-a13b":
        # A13B writes one number a layer.
        per_layer = {"moe_topk": shape.topk, "num_shared_expert": shape.shared_experts}
        config |= {name: [value] * shape.layers for name, value in per_layer.items()}
        config |= {"moe_intermediate_size": [shape.intermediate] * shape.layers, "head_dim": shape.head_channels}
        config["attention_head_dim"] = shape.head_channels
    else:
        if shape.head_size is not None:
            config["attention_head_dim"] = shape.head_size
        config |= {"use_cla": shape.cla, "cla_share_factor": shape.cla_share_factor if shape.cla else 1}
        config |= {"capacity_factor": 1.0, "moe_drop_tokens": False, "moe_random_routing_dropped_token": False}
    return config


def weights_of(shape: TinyShape) -> dict[str, Tensor]:
    """The weights in the separate layout, in bfloat16. The same shape (seed included) gives the same weights."""
    import torch

    generator = torch.Generator().manual_seed(shape.seed)
    weights: dict[str, Tensor] = {}

    def random(name: str, *size: int, mean: float = 0.0, std: float) -> None:
        weights[name] = (mean + std * torch.randn(*size, generator=generator)).bfloat16()

    def norm(name: str, channels: int, mean: float = 1.0) -> None:
        random(f"{name}.weight", channels, mean=mean, std=0.3)

    def linear(name: str, out: int, into: int, gain: float = 1.7) -> None:
        random(f"{name}.weight", out, into, std=gain / into**0.5)
        if shape.attention_bias and ".self_attn." in name:
            random(f"{name}.bias", out, std=0.3)

    def mlp(name: str, width: int) -> None:
        for projection in ("gate_proj", "up_proj"):
            linear(f"{name}.{projection}", width, shape.hidden)
        linear(f"{name}.down_proj", shape.hidden, width)

    random("model.embed_tokens.weight", shape.vocabulary, shape.hidden, std=0.3)
    # As in the real checkpoints there may be more embeddings than tokens: a random one must not win.
    weights["model.embed_tokens.weight"][len(build_tokenizer(shape.vocabulary)) :] = 0
    query_channels, kv_channels = shape.heads * shape.head_channels, shape.kv_heads * shape.head_channels
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        norm(f"{name}.input_layernorm", shape.hidden)
        linear(f"{name}.self_attn.q_proj", query_channels, shape.hidden)
        if shape.has_own_kv(layer):
            linear(f"{name}.self_attn.k_proj", kv_channels, shape.hidden)
            linear(f"{name}.self_attn.v_proj", kv_channels, shape.hidden)
        linear(f"{name}.self_attn.o_proj", shape.hidden, query_channels)
        # Sharper attention than a mean of 1 gives, so that position and key norm matter.
        norm(f"{name}.self_attn.query_layernorm", shape.head_channels, mean=1.8)
        norm(f"{name}.self_attn.key_layernorm", shape.head_channels)
        norm(f"{name}.post_attention_layernorm", shape.hidden)
        if shape.experts == 1:
            mlp(f"{name}.mlp", shape.intermediate)
            continue
        linear(f"{name}.mlp.gate.wg", shape.experts, shape.hidden, gain=2.3)
        for expert in range(shape.experts):
            mlp(f"{name}.mlp.experts.{expert}", shape.intermediate)
        if shape.shared_experts:
            mlp(f"{name}.mlp.shared_mlp", shape.intermediate * shape.shared_experts)
    norm("model.norm", shape.hidden)
    if not shape.tied_embeddings:
        linear("lm_head", shape.vocabulary, shape.hidden, gain=0.3 * shape.hidden**0.5)
    return weights


def write_checkpoint(
    folder: Path,
    shape: TinyShape,
    *,
    layout: str = "separate",
    file_format: str = "safetensors",
    dtype: str = "bfloat16",
    shard_mib: float | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the checkpoint: config, generation config, weights, tokenizer. Returns the folder.

    Args:
        layout: ``separate`` or ``fused`` projections, see :mod:`hycluster.models.layouts`.
        dtype: of the stored weights; ``float32`` holds the same (bfloat16) values, ``fp8`` quantizes them.
        shard_mib: cut the weights into files of at most this size, with an index; None is one file.
        overwrite: replace a checkpoint that is there.

    Raises:
        InvalidInput: an option that is not allowed, or a folder that is not empty.
    """
    for option, value, allowed in (
        ("layout", layout, LAYOUTS),
        ("format", file_format, FORMATS),
        ("dtype", dtype, DTYPES),
    ):
        if value not in allowed:
            raise InvalidInput(f"{option}: {shown(value)} is not allowed; must be one of {', '.join(allowed)}")
    if shard_mib is not None and shard_mib <= 0:
        raise InvalidInput(f"shard_mib: {shown(shard_mib)} is not allowed; must be above 0")
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"path: {str(folder)!r} is a file; must be a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InvalidInput(f"path: {str(folder)!r} is not empty; choose another, or say --overwrite")

    from hycluster.models.layouts import fp8_quantization_config, to_fp8, to_fused

    config, weights = config_of(shape), weights_of(shape)
    if layout == "fused":
        weights = to_fused(weights, shape.kv_heads)
    if dtype == "fp8":
        config["quantization_config"] = fp8_quantization_config(weights)
        weights = to_fp8(weights)
    elif dtype == "float32":
        config["torch_dtype"] = "float32"
        weights = {name: tensor.float() for name, tensor in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer = build_tokenizer(shape.vocabulary)
    # As in Tencent's instruct models, both of these end an answer.
    ends = tokenizer.convert_tokens_to_ids(["<|eos|>", "<|extra_5|>"])
    generation = {"eos_token_id": ends, "pad_token_id": config["pad_token_id"], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    tokenizer.save_pretrained(folder)
    _save(folder, weights, file_format, shard_mib)
    return folder


def _save(folder: Path, weights: Mapping[str, Tensor], file_format: str, shard_mib: float | None) -> None:
    from huggingface_hub import save_torch_state_dict

    for pattern in ("model*.safetensors*", "pytorch_model*.bin*"):
        for old in folder.glob(pattern):
            old.unlink()
    whole = sum(tensor.nbytes for tensor in weights.values()) + 1
    save_torch_state_dict(
        dict(weights),
        folder,
        max_shard_size=whole if shard_mib is None else int(shard_mib * MIB),
        safe_serialization=file_format == "safetensors",
    )
