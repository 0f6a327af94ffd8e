"""Pipeline parallelism on CPU: a stage needs one run before its first step.

vLLM 0.32.0 makes the tensors that a stage receives into in the run that measures memory. On CPU it leaves that run out
if nothing is compiled, and the second stage dies at its first step. ``tests/integration/test_vllm_contract.py`` says
what this relies on.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker


class PipelineWorker(CPUWorker):
    """vLLM's worker, with that run."""

    def determine_available_memory(self) -> int:
        self.model_runner.profile_run()
        return super().determine_available_memory()
