"""What Ray's workers import, before they are forked (``ray_forks.py``)."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Sequence
from types import SimpleNamespace
from unittest.mock import patch

PLAIN = (
    "ray._private.workers.default_worker",
    "ray.data",
    "hycluster.batch_api.executor",
    "hycluster.directory.directory",
    "hycluster.door",
    "hycluster.replica.replica",
    # What an actor's first call and Serve's controller import, but for Serve itself: it reads its variables then.
    "opentelemetry.sdk.trace",
    "pyarrow.json",
    "ray._common.pydantic_compat",
    "ray._private.arrow_serialization",
    "ray.dag",
)
VLLM = (
    "anyio._backends._asyncio",
    "compressed_tensors",
    "hycluster.app",
    "hycluster.engine.simulated",
    "hycluster.engine.vllm",
    "hycluster.gateway.generation",
    "hycluster.ingress.http",
    "hycluster.models.plugin",
    "hycluster.responses.process",
    "ray.serve._private.replica",
    "torch._inductor",
    "vllm.entrypoints.llm",
    "vllm.lora.request",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
)


def import_before_forks(names: Sequence[str]) -> None:
    """In a process of which forks are made; it has one thread afterwards too."""
    import ray.actor
    from ray._raylet import ActorClassID

    from hycluster.imports import without_collector

    # Ray's generator of ids, once used, would give the same to all forks; each module's actor classes get one.
    drawn = SimpleNamespace(from_random=lambda: ActorClassID(os.urandom(ActorClassID.size())))
    with without_collector(), patch.object(ray.actor, "ActorClassID", drawn):
        for name in names:
            importlib.import_module(name)
    gc.freeze()
    running = os.listdir("/proc/self/task")
    assert len(running) == 1, f"a fork has none of the {len(running)} threads"
    assert _drawn_by_a_fork() != _drawn_by_a_fork(), "all forks would draw the same ids"


def _drawn_by_a_fork() -> bytes:
    import ray

    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, ray.ObjectRef.from_random().binary())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading, "rb") as drawn:
        return drawn.read()
