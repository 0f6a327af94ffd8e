from __future__ import annotations

import inspect

import pytest

from tests.sources import set_on_self

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_a_stage_still_needs_a_run() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    from hycluster.engine.patches.cpu_pipeline import PipelineWorker

    assert issubclass(PipelineWorker, Worker)
    # Set to None at first, made in a dummy run, and that is left out if nothing is compiled.
    makers = [
        name
        for name, method in vars(GPUModelRunner).items()
        if inspect.isfunction(method) and "intermediate_tensors" in set_on_self(method)
    ]
    assert makers == ["__init__", "_dummy_run"]
    assert "CompilationMode.NONE:\n            return" in inspect.getsource(CPUModelRunner.warming_up_model)
