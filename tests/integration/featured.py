"""A second cluster for what the first has no room for: two ingress processes, adapters, KV offload, speculative
decoding, control routes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.conftest import Served, launch, stop
from tests.lora_adapters import attention_of, write_adapter

TINY = "tiny"
DRAFTED = ("ngram", "draft")
MAX_CPU_LORAS = 4
# Tokens of a KV block on CPU, and of the tiny model's whole KV cache.
BLOCK_TOKENS, KV_TOKENS = 128, 1024
# Of the tiny model, tests/conftest.py: what an adapter must fit.
LAYERS, HIDDEN = 2, 64


@dataclass
class Featured:
    """The cluster, and the folders of its adapters by name: a and b are in the settings, c is not."""

    served: Served
    adapters: dict[str, Path]
    environment: dict[str, str]


@contextmanager
def featured_cluster(folder: Path, tiny_model: Path) -> Iterator[Featured]:
    """Start it; drain and stop it at the end."""
    shapes = attention_of(LAYERS, HIDDEN)
    adapters = {name: write_adapter(folder / name, shapes, seed=seed) for seed, name in enumerate("abc")}
    speculative: list[dict[str, Any]] = [
        {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
        {"model": str(tiny_model), "num_speculative_tokens": 3},
    ]
    settings = {
        "models": [
            {
                "name": TINY,
                "source": str(tiny_model),
                "engine": {"max_model_len": 512, "max_num_seqs": 4, "max_cpu_loras": MAX_CPU_LORAS},
                "adapters": [{"name": name, "source": str(adapters[name])} for name in "ab"],
                # 2 layers x 2 (K, V) x 2 heads x 32 x 4 bytes: 1 KiB a token, so 1024 tokens, and 100 times as many.
                "hardware": {"cpus": 0.2, "kv_cache_gib": 1 / 1024, "kv_offload_gib": 0.1},
                "replicas": {"min": 2},
            },
            *(
                {
                    "name": name,
                    "source": str(tiny_model),
                    "engine": {"max_model_len": 512, "max_num_seqs": 4, "speculative_config": config},
                    "hardware": {"cpus": 0.2, "kv_cache_gib": 0.05},
                }
                for name, config in zip(DRAFTED, speculative, strict=True)
            ),
        ],
        "router": {"follow_kv_blocks": True},
        # Ingress processes share a port only if it is the same one.
        "http": {"port": free_port(), "control_routes": True},
        "grpc": {"port": free_port()},
        "ingress": {"replicas": 2},
        "data_plane": {"host": "127.0.0.1"},
        "batches": {"store": str(folder / "batches")},
        # Of nobody, who is a tenant too.
        "ledger": {"enabled": True},
        # What a killed ingress process had in the background is soon taken over.
        "responses": {"lease_s": 3, "poll_s": 0.3},
        "drain_timeout_s": 5,
    }
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    # A home of its own: the commands' default cluster stays the first one.
    environment = {
        "HYCLUSTER_HOME": str(folder / "home"),
        "RAY_ADDRESS": "",
        # Without it vLLM has no routes for sleep.
        "VLLM_SERVER_DEV_MODE": "1",
    }
    served = launch([str(path)], folder / "serve.log", environment)
    try:
        yield Featured(served, adapters, environment)
    finally:
        stop(served.process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
