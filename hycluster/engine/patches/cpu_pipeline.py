"""A stage of a pipeline on CPU has one run before its first step.

What: the worker runs its model once where vLLM's CPU worker only works out how much memory there is.
Why: vLLM makes the tensors that a stage receives into in the run that measures memory. On CPU it leaves that run out
if nothing is compiled, and the second stage dies at its first step.
Upstream: none filed.
Version: vLLM 0.32.0. Named in the engine's arguments (``worker_cls``). Watched by
``tests/engine/patches/test_cpu_pipeline.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

from vllm.v1.worker.cpu_worker import CPUWorker


class PipelineWorker(CPUWorker):
    """vLLM's worker, with that run."""

    def determine_available_memory(self) -> int:
        self.model_runner.profile_run()
        return super().determine_available_memory()
