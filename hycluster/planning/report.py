"""The plan as tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hycluster.planning.architecture import GIB, KIB
from hycluster.planning.layouts import describe
from hycluster.planning.plan import Plan
from hycluster.planning.shares import DeviceShare
from hycluster.settings.parallel import Parallel

MOST_ALTERNATIVES = 6
MOST_REASONS = 8
# They fit a terminal of 80 characters.
COLUMNS = (
    "layout",
    "GPUs",
    "weights\nGiB/GPU",
    "KV cache\nKiB/token",
    "KV room\nGiB/GPU",
    "sequences",
    "tokens/s\neach",
)


def show_plan(plan: Plan, console: Console) -> None:
    """Print the plan."""
    console.print(_model(plan))
    console.print(_layouts(plan))
    cuts = (
        ("TP, PP, DP, EP", "tensor, pipeline, data, expert") if plan.model.experts else ("TP, PP", "tensor, pipeline")
    )
    console.print(f"{cuts[0]}: {cuts[1]} parallel; room below 0 is missing", style="dim")
    for line in lines(plan):
        console.print(line, highlight=False)


def billions(count: int) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e8 else f"{count / 1e6:.1f} million"


def gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


def kib(count: float) -> str:
    return f"{count / KIB:,.0f} KiB" if count >= 10 * KIB or count % KIB == 0 else f"{count / KIB:.1f} KiB"


def tokens(count: float) -> str:
    return f"{count / 1e6:.1f} million tokens" if count >= 1e6 else f"{count:,.0f} tokens"


def _model(plan: Plan) -> Table:
    model, counted = plan.model, plan.counted
    table = Table(title=f"{model.kind}, held in {plan.precision.weights}", show_header=False, title_justify="left")
    table.add_row("parameters", billions(counted.total))
    if model.experts:
        table.add_row("active", f"{billions(counted.active)}: {model.top_k} of {model.experts} experts a token")
    table.add_row("weights", ", ".join(f"{dtype} {gib(size)}" for dtype, size in plan.weights_bytes.items()))
    share = plan.kv_bytes_per_token / plan.mha_kv_bytes_per_token
    table.add_row(
        "KV cache", f"{kib(plan.kv_bytes_per_token)} a token in {plan.precision.kv}, {share:.1%} of full attention's"
    )
    table.add_row("one sequence", f"{gib(plan.kv_bytes_of_context)} at {plan.demand.context_tokens:,} tokens")
    return table


def _layouts(plan: Plan) -> Table:
    gpu, demand = plan.gpu, plan.demand
    table = Table(
        title=f"On {gpu.name} ({gpu.memory_gib:g} GiB, {demand.per_node} a node), {demand.concurrency:,} x"
        f" {demand.context_tokens:,} tokens at a time",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == COLUMNS[0] else "right", no_wrap=True)
    for misfit in plan.too_large:
        table.add_row(*_cells(misfit.share, misfit.parallel, 1, -misfit.missing_bytes), "-", "-", style="dim")
    for fit, style in ((plan.chosen, "bold"), *((fit, "") for fit in plan.alternatives[:MOST_ALTERNATIVES])):
        cells = _cells(fit.share, fit.parallel, fit.replicas, fit.free_bytes)
        table.add_row(*cells, f"{fit.sequences:,}", f"{fit.decode.tokens_per_s_each:,.0f}", style=style)
    return table


def _cells(share: DeviceShare, parallel: Parallel, replicas: int, room_bytes: float) -> tuple[str, ...]:
    kv = share.kv_bytes_per_token / KIB
    return (
        f"{replicas} x {short(parallel)}" if replicas > 1 else short(parallel),
        str(replicas * parallel.devices),
        f"{share.weights_bytes / GIB:.1f}",
        f"{kv:,.0f}" if kv >= 10 or kv.is_integer() else f"{kv:.1f}",
        f"{room_bytes / GIB:.1f}",
    )


def short(parallel: Parallel) -> str:
    """``TP8 DP2 EP``, as the field writes it; the sentences say it in words."""
    sizes = (("TP", parallel.tensor), ("PP", parallel.pipeline), ("DP", parallel.data))
    words = [f"{name}{size}" for name, size in sizes if size > 1]
    if parallel.expert and parallel.expert_ranks > 1:
        words.append("EP")
    return " ".join(words) or "one GPU"


def lines(plan: Plan) -> Iterator[str]:
    """What the tables do not say, a sentence each."""
    chosen, demand, full = plan.chosen, plan.demand, plan.full
    nodes = chosen.nodes(demand.per_node)
    replicas = f"{chosen.replicas} replicas" if chosen.replicas > 1 else "a replica"
    yield (
        f"smallest: {chosen.gpus} {plan.gpu.name}, {nodes} node{'s' if nodes > 1 else ''}, as {replicas} with"
        f" {describe(chosen.parallel)}"
    )
    for misfit in plan.too_large[-1:]:
        yield f"fewer than that: with {describe(misfit.parallel)}, {gib(misfit.missing_bytes)} are missing on a GPU"
    yield from (f"note: {remark}" for remark in plan.remarks)
    one = chosen.decode
    yield (
        f"decode, at most: {one.tokens_per_s:,.0f} tokens/s with {one.batch} at a time ({one.limit}),"
        f" {full.tokens_per_s:,.0f} with the {full.batch:,} that a replica holds ({full.limit})"
    )
    if plan.model.experts:
        yield f"experts read a step and layer: {one.experts_touched:.1f} and {full.experts_touched:.1f} expected"
    yield f"first token of a prompt of {demand.context_tokens:,} tokens, alone: not before {plan.prefill_s:.2f} s"
    kv = plan.kv_offload
    yield (
        f"hardware.kv_offload_gib: each GiB of a rank keeps {tokens(kv.tokens_per_gib)} for prompts seen before;"
        f" reading back {tokens(kv.read_tokens_per_s)}/s at most, prefill {tokens(kv.prefill_tokens_per_s)}/s at most;"
        " no more sequences at a time"
    )
    if (host := plan.weight_offload) is not None:
        yield (
            f"engine.cpu_offload_gb: {host.offload_gib} with {describe(host.parallel)} would do with"
            f" {host.parallel.devices} GPU{'s' if host.parallel.devices > 1 else ''} a replica, at"
            f" {host.tokens_per_s_each:,.1f} tokens/s at most for one sequence alone"
            f" ({plan.gpu.host_gbs:g} GB/s from the host)"
        )
    reasons = plan.found.refused
    yield from (f"does not work: {reason}" for reason in reasons[:MOST_REASONS])
    if len(reasons) > MOST_REASONS:
        yield f"and {len(reasons) - MOST_REASONS} more reasons of the kind; all with --json"
    yield "At most, not before: bounds of the hardware, without communication. No engine reaches them."
