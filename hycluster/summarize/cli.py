"""``hycluster summarize``: texts of any length, through the running cluster."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hycluster.errors import SettingsError
from hycluster.terminal import INTERRUPTED_EXIT, console, echo

if TYPE_CHECKING:
    from hycluster.summarize.output import Summarized, SummaryOutput
    from hycluster.summarize.run import SummaryOptions

# As of ``hycluster.client``, which is not imported for --help.
ADDRESS = "127.0.0.1:9000"


def summarize(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Texts in UTF-8; a folder is its *.md and *.txt, - is standard input."),
    ],
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="The cluster's gRPC ingress.")] = ADDRESS,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Model; default: the only one served.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a summary.")] = 512,
    part_tokens: Annotated[
        int | None, typer.Option(min=64, help="Most tokens of a part, where a text is longer than the context.")
    ] = None,
    overlap_tokens: Annotated[int, typer.Option(min=0, help="Tokens of the part before that a part repeats.")] = 0,
    together: Annotated[bool, typer.Option("--together", help="One summary of all files.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Also write JSON lines, one for each file, to PATH.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of text.")] = False,
    keep_tree: Annotated[
        bool, typer.Option("--keep-tree", help="Put the tree of summaries into the JSON lines.")
    ] = False,
    concurrency: Annotated[
        int, typer.Option(min=1, max=1024, help="Most calls in flight, for all files together.")
    ] = 16,
    retry_s: Annotated[
        float, typer.Option(min=0, help="Seconds for which a call is retried while no replica can serve it.")
    ] = 300,
    priority: Annotated[
        Literal["online", "batch"], typer.Option(help="Priority: with online requests, or behind them as batch work.")
    ] = "online",
) -> None:
    """Summarize texts of any length through the running cluster.

    A text longer than the model's context is cut into parts, whose summaries are summarized level by level.
    Exit codes: 0 all files have a summary; 1 some have not, each told on a line; 2 wrong use; 130 interrupted.
    """
    if keep_tree and not (as_json or output):
        raise SettingsError("--keep-tree: needs --json or --output PATH; plain text has no place for it")
    from hycluster.batch.job import Summary
    from hycluster.core import Priority, Sampling
    from hycluster.settings.read import validate
    from hycluster.summarize.files import files_of
    from hycluster.summarize.output import open_output
    from hycluster.summarize.run import SummaryOptions

    found = files_of(files)
    if output is not None and any(output.resolve() == Path(file).resolve() for file in found):
        raise SettingsError(f"--output: {output} is one of the files to summarize")
    sizes = {"part_tokens": part_tokens, "overlap_tokens": overlap_tokens}
    wish = SummaryOptions(
        model=model,
        # Greedy: the same text gives the same summary.
        sampling=Sampling(max_tokens=max_tokens, temperature=0),
        settings=validate(Summary, sizes, "summarize"),
        priority=Priority[priority.upper()],
        calls_at_once=concurrency,
        together=together,
        retry_s=retry_s,
    )
    headings = len(found) > 1 and not together
    try:
        with open_output(output, as_json=as_json, headings=headings, keep_tree=keep_tree) as out:
            failed = asyncio.run(_show(found, wish, address, out))
    except KeyboardInterrupt:
        echo("stopped", err=True)
        raise typer.Exit(INTERRUPTED_EXIT) from None
    raise typer.Exit(1 if failed else 0)


async def _show(files: list[str], wish: SummaryOptions, address: str, out: SummaryOutput) -> int:
    """The number of documents without a summary."""
    from hycluster.summarize.progress import SummaryProgress, progress_shown
    from hycluster.summarize.run import summarize_files

    progress = SummaryProgress(1 if wish.together else len(files))
    errors: list[str] = []

    def done(document: Summarized) -> None:
        out.write(document)
        if document.error is not None:
            errors.append(f"error: {', '.join(document.files)}: {document.error}")

    begun_s = time.monotonic()
    async with progress_shown(progress, console(stderr=True)):
        await summarize_files(files, wish, address, progress, done)
    for error in errors:
        echo(error, err=True)
    echo(
        f"{len(files) - len(errors)} of {len(files)} files summarized in {progress.answered} calls,"
        f" {progress.tokens} tokens, {time.monotonic() - begun_s:.1f} s",
        err=True,
    )
    return len(errors)
