"""`make demo`: the two journeys on one laptop, with the embedded model.

Starts the cluster, gives it a batch job over real texts, asks it two questions while the job runs
(one over HTTP, one streamed over gRPC), and checks and shows what came out. Exits 0 only if all of
it worked; leaves the corpus, the summaries and the logs in out/demo.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from demo_corpus import write_corpus
from demo_process import DemoFailed, Process
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hycluster.client import Client
from hycluster.errors import HyclusterError
from hycluster.settings.read import DEFAULT_SETTINGS, load_settings

TEXTS = 48
SHOWN = 8
START_TIMEOUT_S = 900
JOB_TIMEOUT_S = 1800
CALL_TIMEOUT_S = 300
OUT = Path("out/demo")

console = Console(highlight=False, soft_wrap=True)


@contextlib.contextmanager
def step(title: str) -> Iterator[Callable[[str], None]]:
    """Show what goes on, then how long it took. Yields a function that shows a detail beside the title."""
    begun = time.monotonic()
    if not console.is_terminal:
        console.print(f"... {title}")
    with console.status(title) as status:
        yield lambda detail: status.update(Text.assemble(title, ("  " + detail[: console.width // 2], "dim")))
    console.print(f"[green]✓[/green] {title} [dim]({time.monotonic() - begun:.1f} s)[/dim]")


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    # The demo brings its own cluster, and must not touch one that this shell points at.
    os.environ.pop("RAY_ADDRESS", None)
    begun = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    running: list[Process] = []
    try:
        corpus, summaries = OUT / "corpus", OUT / "summaries"
        model = load_settings(DEFAULT_SETTINGS).models[0].name

        with step("Collecting texts: what the installed packages say of themselves"):
            texts = write_corpus(corpus, TEXTS)
        console.print(f"  {texts.num_rows} texts in {corpus}")

        with step(f"Starting the cluster with {model}") as show:
            server = Process(
                ["serve", str(DEFAULT_SETTINGS), "--http-port", "0", "--grpc-port", "0"], OUT / "serve.log"
            )
            running.append(server)
            ready = server.wait_for(lambda line: line.startswith("ready"), START_TIMEOUT_S, show)
            http, grpc, ray = addresses(ready)
            if ray:
                # So that the job joins this cluster, whatever else runs on this machine.
                os.environ["RAY_ADDRESS"] = ray
        console.print(f"  HTTP at {http}, gRPC at {grpc}")

        job_begun = time.monotonic()
        with step("Starting the batch job at low priority") as show:
            arguments = ["run", "jobs/summarize.yaml", "--input", str(corpus), "--output", str(summaries)]
            job = Process(["batch", *arguments, "--set", "sampling.max_tokens=64"], OUT / "batch.log")
            running.append(job)
            job.wait_for(lambda line: re.search(r"\d+/\d+ rows", line), JOB_TIMEOUT_S, show)

        ask_over_http(http, model)
        ask_over_grpc(grpc, model)
        console.print(f"  the job was {'still running' if job.running() else 'over'} by then")

        with step("Waiting for the rest of the batch job") as show:
            job.wait(JOB_TIMEOUT_S, show)
        job_s = time.monotonic() - job_begun

        results = check(texts, summaries)
        show_results(texts, results, job_s)

        with step("Draining and stopping the cluster"):
            running.remove(server)
            if not server.stop():
                raise DemoFailed(f"{server.name}: did not stop cleanly on SIGTERM; its log is {server.log}")
    except (DemoFailed, HyclusterError, httpx.HTTPError) as error:
        console.print("[red]✗ the demo failed:[/red]", Text(f"{type(error).__name__}: {error}"))
        console.print(f"  the server's log: {OUT / 'serve.log'}")
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    finally:
        for process in reversed(running):
            process.stop()
    console.print(
        f"\nDone in {time.monotonic() - begun:.0f} s. The summaries are in [bold]{summaries}[/bold] (Parquet)."
    )
    return 0


def addresses(ready: str | None) -> tuple[str, str, str | None]:
    """The HTTP base URL, the gRPC target and, if it is told, the Ray address in the server's ready line."""
    found = re.search(r"(http://\S+:\d+).*?\bgrpc (\S+:\d+)(?:.*?\bray (\S+:\d+))?", ready or "")
    if not found:
        raise DemoFailed(f"hycluster serve: no addresses in its ready line: {ready!r}")
    return found[1], found[2], found[3]


def ask_over_http(url: str, model: str) -> None:
    """One chat call over the OpenAI API."""
    question = "What is the capital of France? Answer in one sentence."
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 40,
        "temperature": 0,
    }
    with step("One chat call over HTTP, while the job runs"):
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=CALL_TIMEOUT_S)
        if answer.status_code != httpx.codes.OK:
            raise DemoFailed(f"HTTP: status {answer.status_code}: {answer.text}")
        text = answer.json()["choices"][0]["message"]["content"]
    if not text.strip():
        raise DemoFailed("HTTP: the answer is empty")
    _show_exchange(question)
    console.print(Text(f"  < {text.strip()}"))


def ask_over_grpc(target: str, model: str) -> None:
    """One streamed call over gRPC, shown as it comes."""
    question = "Why is the sky blue? Answer in two sentences."
    begun = time.monotonic()
    _show_exchange(question)
    console.print("  < ", end="")
    text, chunks, first_s = "", 0, 0.0
    with Client(target) as client:
        messages = [{"role": "user", "content": question}]
        for delta in client.stream(model, messages=messages, max_tokens=64, temperature=0, timeout_s=CALL_TIMEOUT_S):
            for output in delta.outputs:
                first_s = first_s or time.monotonic() - begun
                text += output.text
                chunks += 1
                console.print(Text(output.text), end="")
    console.print()
    if not text.strip():
        raise DemoFailed("gRPC: the answer is empty")
    console.print(
        f"[green]✓[/green] One call streamed over gRPC in {chunks} chunks, the first after {first_s:.2f} s"
        f" [dim]({time.monotonic() - begun:.1f} s)[/dim]"
    )


def _show_exchange(question: str) -> None:
    console.print(Text(f"  > {question}", style="dim"))


def check(texts: pa.Table, output: Path) -> dict[str, dict[str, Any]]:
    """The job's results by text name, if there is exactly one non-empty summary for every text."""
    for name in ("_manifest.json", "_SUCCESS"):
        if not (output / name).is_file():
            raise DemoFailed(f"batch: {output / name} is missing")
    shards = json.loads((output / "_manifest.json").read_text())["shards"]
    quarantined = sum(shard["quarantine"]["rows"] for shard in shards if shard["quarantine"])
    if quarantined:
        raise DemoFailed(f"batch: {quarantined} rows were quarantined; see {output / '_quarantine'}")
    parts = [output / shard["part"]["path"] for shard in shards if shard["part"]]
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    names = sorted(row["name"] for row in rows)
    if names != sorted(texts["name"].to_pylist()):
        raise DemoFailed(
            f"batch: {texts.num_rows} texts went in, {len(rows)} came out ({len(set(names))} of them distinct)"
        )
    empty = [row["name"] for row in rows if not row["output"].strip()]
    if empty:
        raise DemoFailed(f"batch: the summaries of {', '.join(empty)} are empty")
    return {row["name"]: row for row in rows}


def show_results(texts: pa.Table, results: dict[str, dict[str, Any]], seconds: float) -> None:
    """A few of the summaries, spread over the corpus, and what all of them took."""
    table = Table(title=f"{SHOWN} of {len(results)} summaries", title_justify="left")
    table.add_column("text", no_wrap=True)
    for heading in ("characters", "tokens in", "out"):
        table.add_column(heading, justify="right")
    table.add_column("finish")
    table.add_column("summary", ratio=1, min_width=40)
    stride = max(1, texts.num_rows // SHOWN)
    for text in texts.to_pylist()[::stride][:SHOWN]:
        row = results[text["name"]]
        words = " ".join(row["output"].split())
        table.add_row(
            text["name"],
            str(len(text["text"])),
            str(row["prompt_tokens"]),
            str(row["completion_tokens"]),
            row["finish_reason"],
            Text(words if len(words) <= 160 else words[:160].rsplit(" ", 1)[0] + " …"),
        )
    console.print(table, soft_wrap=False)
    prompt = sum(row["prompt_tokens"] for row in results.values())
    completion = sum(row["completion_tokens"] for row in results.values())
    console.print(
        f"[green]✓[/green] {len(results)} texts, one summary each: {prompt} tokens in, {completion} out,"
        f" {completion / seconds:.1f} tokens/s [dim]({seconds:.1f} s, the start of the job included)[/dim]"
    )


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
