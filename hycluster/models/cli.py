"""``hycluster tiny-model``: a random checkpoint to try the Hunyuan way with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hycluster.errors import InvalidInput
from hycluster.models.tiny import ARCHITECTURES, DTYPES, FORMATS, LAYOUTS, TinyShape, write_checkpoint
from hycluster.terminal import echo

DEFAULT = TinyShape()


def tiny_model(
    path: Annotated[Path, typer.Argument(metavar="[PATH]", help="Folder to write the checkpoint to.")] = Path(
        "hunyuan-tiny"
    ),
    architecture: Annotated[
        str, typer.Option(metavar="|".join(ARCHITECTURES), help="Whose parts it has.")
    ] = DEFAULT.architecture,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = DEFAULT.layers,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = DEFAULT.hidden,
    intermediate: Annotated[int, typer.Option(help="FFN width of one expert.")] = DEFAULT.intermediate,
    heads: Annotated[int, typer.Option(help="Query heads.")] = DEFAULT.heads,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.")] = DEFAULT.kv_heads,
    head_size: Annotated[int | None, typer.Option(help="Head size; default: hidden / heads.")] = None,
    experts: Annotated[int, typer.Option(help="Routed experts; 1 is a plain MLP.")] = DEFAULT.experts,
    topk: Annotated[int, typer.Option(help="Experts for each token (top-k).")] = DEFAULT.topk,
    shared_experts: Annotated[int, typer.Option(help="Shared experts; 0: none.")] = DEFAULT.shared_experts,
    vocabulary: Annotated[int, typer.Option("--vocab", help="Vocabulary size.")] = DEFAULT.vocabulary,
    context_tokens: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = DEFAULT.context_tokens,
    cla: Annotated[
        bool | None, typer.Option("--cla/--no-cla", help="Cross-layer attention; default: as the architecture has it.")
    ] = None,
    cla_share_factor: Annotated[
        int | None, typer.Option(help=f"Layers that share keys and values; default: {DEFAULT.cla_share_factor}.")
    ] = None,
    rope_alpha: Annotated[float, typer.Option(help="RoPE scaling; 0 is none.")] = DEFAULT.rope_alpha,
    attention_bias: Annotated[bool, typer.Option(help="Bias in the attention projections.")] = DEFAULT.attention_bias,
    tied_embeddings: Annotated[
        bool, typer.Option("--tied-embeddings/--untied-embeddings", help="Tie the output head to the embedding.")
    ] = DEFAULT.tied_embeddings,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = DEFAULT.seed,
    layout: Annotated[
        str, typer.Option(metavar="|".join(LAYOUTS), help="Layout in which projections are stored.")
    ] = LAYOUTS[0],
    file_format: Annotated[
        str, typer.Option("--format", metavar="|".join(FORMATS), help="File format of the weights.")
    ] = FORMATS[0],
    dtype: Annotated[str, typer.Option(metavar="|".join(DTYPES), help="Data type of the stored weights.")] = DTYPES[0],
    shard_mib: Annotated[float | None, typer.Option(help="Largest weight file in MiB; default: one file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
) -> None:
    """Write a tiny random Hunyuan checkpoint to PATH: config, weights, tokenizer with chat template.

    The layout is Tencent's, so whatever serves this serves the real ones.
    """
    with_cla = architecture == "hunyuan-large" if cla is None else cla
    if cla_share_factor is not None and not with_cla:
        raise InvalidInput(f"cla_share_factor: {cla_share_factor} has no effect without cross-layer attention (--cla)")
    shape = TinyShape(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        experts=experts,
        topk=topk,
        shared_experts=shared_experts,
        vocabulary=vocabulary,
        context_tokens=context_tokens,
        cla=with_cla,
        cla_share_factor=DEFAULT.cla_share_factor if cla_share_factor is None else cla_share_factor,
        rope_alpha=rope_alpha,
        attention_bias=attention_bias,
        tied_embeddings=tied_embeddings,
        seed=seed,
    )
    write_checkpoint(
        path, shape, layout=layout, file_format=file_format, dtype=dtype, shard_mib=shard_mib, overwrite=overwrite
    )
    echo(str(path))
