"""What a model weighs and what a token costs: arithmetic on a Hugging Face configuration, nothing is loaded.

Knows decoders of the Llama family and their mixtures of experts, and Hunyuan's cross-layer attention. Parameters are
counted as they are stored; what vLLM adds for padding or keeps in float32 beside is left out (below 0.1%).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hycluster.config import Parallel
from hycluster.errors import SettingsError, shown

KIB, GIB = 2**10, 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}

_HUNYUAN = ("hunyuan", "hunyuan_v1_moe")
# By model_type: what its code does and its configuration does not say.
_QK_NORM = {"qwen3", "qwen3_moe", "hunyuan_v1_moe"}
_QKV_BIAS = {"qwen2"}
_KNOWN = (*_HUNYUAN, "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Widths are in channels.

    Attributes:
        caches_kv: has keys and values of its own; False where it reads an earlier layer's.
        experts: routed experts; 0 makes it a plain MLP of width ``ffn``.
        top_k: routed experts a token.
        ffn: width of a routed expert, or of the plain MLP.
        shared_ffn: width of all shared experts together.
    """

    caches_kv: bool
    experts: int
    top_k: int
    ffn: int
    shared_ffn: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder's shape, as far as memory depends on it."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters, over all layers.

    Attributes:
        experts: of the routed experts.
        active_experts: of those that one token goes through.
        mlp: of the shared experts and the plain MLPs.
        head: 0 where it is the embedding.
    """

    embedding: int
    head: int
    attention: int
    norms: int
    router: int
    experts: int
    active_experts: int
    mlp: int

    @property
    def total(self) -> int:
        return self.active - self.active_experts + self.experts

    @property
    def active(self) -> int:
        """What one token goes through, with the whole embedding counted once."""
        return self.embedding + self.head + self.attention + self.norms + self.router + self.active_experts + self.mlp


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The shape behind a ``config.json``.

    Raises:
        SettingsError: a kind of model that is not known here, or a field that is missing.
    """
    kind = config.get("model_type")
    if kind not in _KNOWN:
        raise SettingsError(f"model_type: {shown(kind)} is not known; must be one of {', '.join(_KNOWN)}")
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    bias = bool(config.get("attention_bias"))
    return Architecture(
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_size=int(config.get("head_dim") or config.get("attention_head_dim") or hidden // heads),
        vocabulary=_number(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings")),
        qk_norm=bool(config.get("use_qk_norm", kind in _QK_NORM)),
        qkv_bias=bias or kind in _QKV_BIAS,
        o_bias=bias,
        layers=tuple(
            (_hunyuan_layer if kind in _HUNYUAN else _layer)(config, index)
            for index in range(_number(config, "num_hidden_layers"))
        ),
    )


def _number(config: Mapping[str, Any], name: str, default: int | None = None, layer: int | None = None) -> int:
    value = config.get(name)
    if isinstance(value, list) and layer is not None and layer < len(value):
        value = value[layer]
    value = default if value is None else value
    if not isinstance(value, int):
        raise SettingsError(f"{name}: {shown(value)} is not allowed; must be a number")
    return int(value)


def _hunyuan_layer(config: Mapping[str, Any], index: int) -> Layer:
    sharing = _number(config, "cla_share_factor", 1) if config.get("use_cla") else 1
    ffn = _number(config, "intermediate_size")
    experts = 0 if index < _number(config, "moe_layer_num_skipped", 0) else _number(config, "num_experts", 1, index)
    routed = experts > 1
    # transformers' own A13B configuration has no such switch: its shared expert is always there.
    shared = routed and config.get("use_mixed_mlp_moe", config["model_type"] == "hunyuan_v1_moe")
    return Layer(
        caches_kv=index % sharing == 0,
        experts=experts if routed else 0,
        top_k=_number(config, "moe_topk", 1, index) if routed else 0,
        ffn=_number(config, "moe_intermediate_size", ffn, index) if routed else ffn,
        shared_ffn=ffn * _number(config, "num_shared_expert", 1, index) if shared else 0,
    )


def _layer(config: Mapping[str, Any], index: int) -> Layer:
    ffn = _number(config, "intermediate_size")
    # Files say one or the other.
    experts = _number(config, "num_local_experts", _number(config, "num_experts", 0))
    step = _number(config, "decoder_sparse_step", 1)
    if not experts or index in (config.get("mlp_only_layers") or ()) or (index + 1) % step:
        return Layer(caches_kv=True, experts=0, top_k=0, ffn=ffn, shared_ffn=0)
    return Layer(
        caches_kv=True,
        experts=experts,
        top_k=_number(config, "num_experts_per_tok"),
        ffn=_number(config, "moe_intermediate_size", ffn),
        shared_ffn=0,
    )


def parameters(model: Architecture) -> Parameters:
    """Count a model's parameters."""
    embedding = model.vocabulary * model.hidden
    return Parameters(
        embedding=embedding,
        head=0 if model.tied else embedding,
        attention=sum(_attention(model, layer) for layer in model.layers),
        norms=model.hidden + len(model.layers) * (2 * model.hidden + (2 * model.head_size if model.qk_norm else 0)),
        router=sum(model.hidden * layer.experts for layer in model.layers),
        experts=sum(layer.experts * _mlp(model, layer.ffn) for layer in model.layers),
        active_experts=sum(layer.top_k * _mlp(model, layer.ffn) for layer in model.layers),
        mlp=sum(_mlp(model, layer.shared_ffn if layer.experts else layer.ffn) for layer in model.layers),
    )


def _attention(model: Architecture, layer: Layer) -> int:
    query = model.heads * model.head_size
    kv = 2 * model.kv_heads * model.head_size if layer.caches_kv else 0
    biases = (query + kv if model.qkv_bias else 0) + (model.hidden if model.o_bias else 0)
    return model.hidden * (2 * query + kv) + biases


def _mlp(model: Architecture, width: int) -> int:
    """Gate, up and down projection."""
    return 3 * model.hidden * width


def expert_parameters(model: Architecture) -> int:
    """One routed expert over all layers: what an expert parallel rank holds for each that it is given."""
    return sum(_mlp(model, layer.ffn) for layer in model.layers if layer.experts)


def kv_bytes_per_token(model: Architecture, dtype: str = "bfloat16") -> int:
    """Bytes of KV cache that one token takes in the whole model."""
    caching = sum(layer.caches_kv for layer in model.layers)
    return caching * 2 * model.kv_heads * model.head_size * _bytes(dtype)


def mha_kv_bytes_per_token(model: Architecture, dtype: str = "bfloat16") -> int:
    """The same with a key and a value for each query head in each layer, for comparison."""
    return len(model.layers) * 2 * model.heads * model.head_size * _bytes(dtype)


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What the fullest device of a replica holds.

    Attributes:
        weights_bytes: its share of the weights.
        kv_bytes_per_token: of each token that this device's data parallel rank serves.
    """

    weights_bytes: int
    kv_bytes_per_token: int

    def kv_tokens(self, memory_gib: float, utilization: float = 0.9, reserve_gib: float = 4.0) -> int:
        """Tokens that the KV cache of one data parallel rank holds.

        Args:
            memory_gib: the device's memory.
            utilization: the share that vLLM may use (``gpu_memory_utilization``).
            reserve_gib: activations, CUDA graphs and communication buffers; an estimate, vLLM measures at its start.
        """
        free = memory_gib * GIB * utilization - reserve_gib * GIB - self.weights_bytes
        return max(0, int(free // self.kv_bytes_per_token))


def device_share(
    model: Architecture, parallel: Parallel, weights: str = "bfloat16", kv: str = "bfloat16"
) -> DeviceShare:
    """How vLLM spreads a replica over its devices.

    Attention, shared experts, embedding and head are cut by ``tensor``; KV heads no further than into single heads.
    Routed experts, with their redundant copies, lie whole on ``tensor x data`` ranks with ``expert``, and are cut that
    often without. Router and norms are on every device.

    Args:
        weights: data type of the projections. With 8 bits the embedding, the head, router and norms keep 16.
        kv: data type of the KV cache.
    """
    counted = parameters(model)
    size, rest = _bytes(weights), max(2, _bytes(weights))
    tensor, ranks = parallel.tensor, parallel.expert_ranks
    stage = -(-len(model.layers) // parallel.pipeline)
    layers = stage / len(model.layers)
    heads_stored = max(1, model.kv_heads // tensor) * tensor
    caching_layers = sum(layer.caches_kv for layer in model.layers)
    more_kv = (heads_stored - model.kv_heads) * 2 * model.head_size * model.hidden * caching_layers
    most_experts = max(layer.experts for layer in model.layers)
    routed = counted.experts / ranks
    if parallel.expert and most_experts:
        routed = -(-(most_experts + parallel.eplb.redundant_experts) // ranks) * expert_parameters(model)
    cut = (counted.attention + more_kv + counted.mlp) / tensor
    ends = (counted.embedding + counted.head) / tensor
    weights_bytes = size * layers * (cut + routed) + rest * (layers * (counted.router + counted.norms) + ends)
    most_caching = max(
        sum(layer.caches_kv for layer in model.layers[start : start + stage])
        for start in range(0, len(model.layers), stage)
    )
    return DeviceShare(round(weights_bytes), most_caching * 2 * heads_stored // tensor * model.head_size * _bytes(kv))


def _bytes(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise SettingsError(f"dtype: {shown(dtype)} is not allowed; must be one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]
