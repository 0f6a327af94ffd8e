from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from bench import tiny_llama
from tests.object_store import ObjectStore, object_store
from tests.ray_apart import ray_apart

# How long an example takes says something of the machine, which others use too.
hypothesis.settings.register_profile("house", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session")
def vllm_imported() -> None:
    """For tests of modules that import vLLM: its import takes seconds and warns of third parties' sins."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hycluster.gateway.generation
        import hycluster.ingress.http  # noqa: F401


@pytest.fixture(scope="module")
def some_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The session's cluster if it runs, or a small one."""
    import ray

    with contextlib.nullcontext() if ray.is_initialized() else ray_apart(tmp_path_factory.mktemp("ray")):
        yield


@pytest.fixture(scope="session")
def store() -> Iterator[ObjectStore]:
    """An S3 server (moto) with one bucket."""
    with object_store() as running:
        yield running


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: random weights, a byte-level tokenizer of 258 tokens, a context of 2048."""
    return tiny_llama.make(tmp_path_factory.mktemp("tiny") / "model")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a session's cluster come last, one cluster's after the other's.

    Those clusters live to the end, and others start clusters of their own: on a small machine they must not meet.
    """
    items.sort(key=lambda item: [name in getattr(item, "fixturenames", ()) for name in ("served", "featured")])
