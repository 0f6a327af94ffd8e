"""What hycluster relies on inside vLLM 0.32.0. When one of these fails after an upgrade, read
``hycluster/engine/vllm.py``, ``hycluster/gateway.py`` and ``hycluster/pool.py`` beside vLLM's sources."""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _quiet_import() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm.v1.engine.async_llm  # noqa: F401


def set_on_self(function: Any) -> set[str]:
    """Names of the attributes that a method assigns on ``self``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def calls_on(function: Any, name: str) -> set[str]:
    """Attributes that a function reads of ``self.NAME`` or a local ``NAME``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (f"self.{name}", name)
    }


def test_version() -> None:
    import vllm

    assert vllm.__version__.split("+")[0] == "0.32.0"


def test_gateway_sets_what_async_llm_sets() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    from hycluster.gateway import Gateway

    only_with_a_frontend_profiler = {"_frontend_profiler_worker_name"}
    missing = set_on_self(AsyncLLM.__init__) - set_on_self(Gateway.__init__) - only_with_a_frontend_profiler
    assert not missing


def test_pool_offers_what_async_llm_asks_of_its_engine_core() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    from hycluster.pool import PoolClient

    asked = calls_on(AsyncLLM, "engine_core")
    # Elastic EP, weight transfer, checksums and fault tolerance act on one engine; a pool refuses them.
    of_one_engine = {
        "prepare_elastic_ep",
        "commit_elastic_ep",
        "collective_rpc_async",
        "compute_weight_checksums_async",
        "set_weight_version_async",
        "get_weight_version_async",
        "release_kv_cache_memory_async",
        "handle_fault",
        "get_status",
    }
    set_in_init = {"resources", "engine_ranks_managed"}
    assert asked - set(dir(PoolClient)) - set_in_init == of_one_engine


def test_engine_core_leaves_its_sockets_to_three_methods() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    assert "addresses" in set_on_self(EngineCoreProc.__init__)
    for method in ("_perform_handshakes", "process_input_sockets", "process_output_sockets"):
        assert calls_on(EngineCoreProc.__init__, "self") & {method}
    assert list(inspect.signature(EngineCoreProc.process_input_sockets).parameters)[-1] == "ready_event"
    assert {"input_queue", "output_queue"} <= set_on_self(EngineCoreProc.__init__)


def test_requests_and_outputs_travel_without_pickle() -> None:
    from vllm import envs

    assert envs.VLLM_ALLOW_INSECURE_SERIALIZATION is False
