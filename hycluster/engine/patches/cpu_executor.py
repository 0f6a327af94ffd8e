"""An engine of one rank steps its model in its own process, on CPU as well.

What: the executor of a configuration that vLLM has settled is ``uni`` again.
Why: on CPU vLLM turns ``uni`` into ``mp``, since it can't set OpenMP up in a process that runs already; the worker of
an ``mp`` executor waits for its next step by spinning, on a core that the model could use. A replica's process has its
OpenMP set up from outside (``hycluster/engine/arguments.py``: ``engine_environment``).
Upstream: none filed; vLLM's own switch, ``VLLM_ENABLE_V1_MULTIPROCESSING=0``, has other effects too.
Version: vLLM 0.32.0. Applied where an engine's configuration is made. Watched by
``tests/engine/patches/test_cpu_executor.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

from vllm.config import ParallelConfig


def patch_executor(parallel: ParallelConfig) -> None:
    """Overrule vLLM's choice for an engine of one rank; others keep theirs."""
    if parallel.world_size == 1:
        parallel.distributed_executor_backend = "uni"
