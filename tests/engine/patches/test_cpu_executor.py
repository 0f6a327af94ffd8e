from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]


def test_an_engine_of_one_rank_keeps_its_process() -> None:
    from hycluster.engine.patches.cpu_executor import patch_executor

    for world_size, backend in ((1, "uni"), (2, "mp")):
        parallel: Any = SimpleNamespace(world_size=world_size, distributed_executor_backend="mp")
        patch_executor(parallel)
        assert parallel.distributed_executor_backend == backend


def test_vllm_still_turns_it_into_one_of_its_own(tmp_path: Any, tiny_model: Any) -> None:
    """When this fails, vLLM leaves ``uni`` be on CPU."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    asked = AsyncEngineArgs(model=str(tiny_model), distributed_executor_backend="uni", enforce_eager=True)
    assert asked.create_engine_config().parallel_config.distributed_executor_backend == "mp"
