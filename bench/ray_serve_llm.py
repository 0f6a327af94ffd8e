"""Ray Serve LLM as it comes, for comparison: ``python -m bench.ray_serve_llm MODEL_FOLDER PORT``."""

from __future__ import annotations

import signal
import sys
import threading

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def main() -> None:
    model, port = sys.argv[1], int(sys.argv[2])
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=8)
    config = LLMConfig(
        model_loading_config={"model_id": "tiny", "model_source": model},
        accelerator_type=None,
        placement_group_config={"bundles": [{"CPU": 1}]},
        deployment_config={"num_replicas": 1},
        engine_kwargs={
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "max_num_seqs": 64,
            "kv_cache_memory_bytes": 1 << 30,
            "distributed_executor_backend": "uni",
        },
        runtime_env={
            "env_vars": {
                "OMP_NUM_THREADS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            }
        },
        log_engine_metrics=False,
    )
    stop = threading.Event()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_openai_app({"llm_configs": [config]}), route_prefix="/")
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
