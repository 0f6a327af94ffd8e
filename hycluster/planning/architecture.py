"""A decoder's shape, as far as memory depends on it: its parameters, and the KV cache of a token.

Parameters are counted as they are stored; what vLLM adds for padding or keeps in float32 beside is left out (below
0.1% in real models). Layers for multi-token prediction are left out too: vLLM loads them for speculative decoding only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

KIB, GIB = 2**10, 2**30
KV_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Widths are in channels.

    Attributes:
        caches_kv: has keys and values of its own; False where it reads an earlier layer's.
        experts: routed experts; 0 makes it a plain MLP of width ``ffn``.
        top_k: routed experts a token.
        ffn: width of a routed expert, or of the plain MLP.
        shared_ffn: width of all shared experts together.
        window: tokens back that its attention reaches; None reaches all.
    """

    caches_kv: bool
    experts: int
    top_k: int
    ffn: int
    shared_ffn: int
    window: int | None = None

    @property
    def cached_window(self) -> int | None:
        """Most tokens of a decoding sequence that it keeps: vLLM frees whole blocks behind the window."""
        return None if self.window is None else (-(-self.window // KV_BLOCK_TOKENS) + 1) * KV_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention: one compressed vector a token stands for the keys and values of all heads.

    Attributes:
        query_rank: width of the compressed query; 0 projects queries at once.
        kv_rank: width of the compressed keys and values.
        rope_size: channels of the key that all heads share; with ``kv_rank`` it makes what is cached.
        key_size: channels of a head's key without RoPE.
        value_size: channels of a head's value.
    """

    query_rank: int
    kv_rank: int
    rope_size: int
    key_size: int
    value_size: int


@dataclass(frozen=True, slots=True)
class Extras:
    """Small parameters beside the projections.

    Attributes:
        qk_norm: norms of queries and keys: one for all heads (``head``), or over all channels (``full``).
        norms: norms of the hidden state a layer.
        sinks: a learned attention sink for each query head.
    """

    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    expert_bias: bool = False
    router_bias: bool = False
    shared_gate: bool = False
    sinks: bool = False
    norms: int = 2


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder's shape.

    Attributes:
        kind: ``model_type`` of its configuration.
        tied: the output head is the embedding.
        positions: most tokens of a context, prompt and output; 0 where the configuration does not say.
    """

    kind: str
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    positions: int
    layers: tuple[Layer, ...]
    latent: Latent | None = None
    extras: Extras = Extras()

    @property
    def experts(self) -> int:
        """Routed experts of the layer that has most."""
        return max(layer.experts for layer in self.layers)

    @property
    def top_k(self) -> int:
        return max(layer.top_k for layer in self.layers)

    @property
    def cached_channels(self) -> int:
        """Channels that a layer caches for a token, on one GPU."""
        if self.latent is not None:
            return self.latent.kv_rank + self.latent.rope_size
        return 2 * self.kv_heads * self.head_size

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of a head beside it."""
        return self.vocabulary * self.hidden


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Parameters of one layer.

    Attributes:
        attention: cut by tensor parallel.
        latent: the compressing projections of latent attention, whole on every tensor rank.
        expert: one routed expert.
        mlp: the shared experts or the plain MLP.
    """

    attention: int
    latent: int
    norms: int
    router: int
    expert: int
    mlp: int


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


def layer_parameters(model: Architecture, layer: Layer) -> LayerParameters:
    """Count one layer's parameters."""
    extras, experts = model.extras, layer.experts
    attention, latent, attention_norms = _attention(model, layer)
    gate = model.hidden if extras.shared_gate else 0
    router = (model.hidden * experts + (experts if extras.router_bias else 0) + gate) if experts else 0
    return LayerParameters(
        attention=attention,
        latent=latent,
        norms=extras.norms * model.hidden + attention_norms,
        router=router,
        expert=_mlp(model, layer.ffn, extras.expert_bias) if experts else 0,
        mlp=_mlp(model, layer.shared_ffn if experts else layer.ffn, extras.mlp_bias),
    )


@functools.lru_cache(maxsize=16)
def parameters(model: Architecture) -> Parameters:
    """Count a model's parameters."""
    counted = [(layer, layer_parameters(model, layer)) for layer in model.layers]
    return Parameters(
        embedding=model.embedding,
        head=0 if model.tied else model.embedding,
        attention=sum(one.attention + one.latent for _, one in counted),
        norms=model.hidden + sum(one.norms for _, one in counted),
        router=sum(one.router for _, one in counted),
        experts=sum(layer.experts * one.expert for layer, one in counted),
        active_experts=sum(layer.top_k * one.expert for layer, one in counted),
        mlp=sum(one.mlp for _, one in counted),
    )


def _attention(model: Architecture, layer: Layer) -> tuple[int, int, int]:
    """Parameters that are cut by tensor parallel, that are not, and of norms."""
    if (latent := model.latent) is not None:
        query = model.heads * (latent.key_size + latent.rope_size)
        cut = (latent.query_rank or model.hidden) * query
        cut += model.heads * (latent.kv_rank * (latent.key_size + latent.value_size) + latent.value_size * model.hidden)
        compressed = latent.query_rank + latent.kv_rank + latent.rope_size
        biases = compressed + model.hidden if model.extras.o_bias else 0
        return cut, model.hidden * compressed + biases, latent.query_rank + latent.kv_rank
    extras, query = model.extras, model.heads * model.head_size
    kv = 2 * model.kv_heads * model.head_size if layer.caches_kv else 0
    biases = (query + kv if extras.qkv_bias else 0) + (model.hidden if extras.o_bias else 0)
    norms = {"none": 0, "head": 2 * model.head_size, "full": query + model.kv_heads * model.head_size}[extras.qk_norm]
    return model.hidden * (2 * query + kv) + biases + (model.heads if extras.sinks else 0), 0, norms


def _mlp(model: Architecture, width: int, bias: bool) -> int:
    """Gate, up and down projection."""
    return 3 * model.hidden * width + (2 * width + model.hidden if bias and width else 0)


def expert_parameters(model: Architecture) -> int:
    """One routed expert over all layers: what an expert parallel rank holds for each that it is given."""
    return sum(layer_parameters(model, layer).expert for layer in model.layers)


def kv_channels(model: Architecture, tokens: int | None = None) -> int:
    """Channels that a sequence's KV cache holds, over all layers and on as many GPUs as it takes to have each once.

    Args:
        tokens: of the sequence; None is what one token takes that no window has left yet.
    """
    caching = [layer for layer in model.layers if layer.caches_kv]
    if tokens is None:
        return len(caching) * model.cached_channels
    return sum(min(tokens, layer.cached_window or tokens) for layer in caching) * model.cached_channels


def mha_kv_channels(model: Architecture) -> int:
    """Channels of a token with a key and a value for each query head in each layer, for comparison."""
    head = model.head_size if model.latent is None else model.latent.key_size + model.latent.rope_size
    value = model.head_size if model.latent is None else model.latent.value_size
    return len(model.layers) * model.heads * (head + value)
