"""Which engines a job gets: where its first rows go, before any engine is asked."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from hycluster import cluster, first_rows, job_engines
from hycluster.batch.job import Job
from hycluster.directory import directory as directory_module
from hycluster.directory.directory import IngressReport

HERE, ELSEWHERE = "node-1", "node-2"
OWN = "by a gateway of its own"


class Remote:
    """Stands for an actor's method."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def remote(self) -> Any:
        return self._value


@pytest.mark.parametrize(
    ("ingresses", "way"),
    [
        ([], OWN),
        ([IngressReport(ELSEWHERE, "elsewhere:1", everywhere=False)], OWN),
        ([IngressReport(ELSEWHERE, "elsewhere:1", everywhere=True)], "elsewhere:1"),
        (
            [IngressReport(ELSEWHERE, "elsewhere:1", everywhere=True), IngressReport(HERE, "here:1", everywhere=False)],
            "here:1",
        ),
    ],
)
def test_the_first_rows_go_by_an_ingress_that_is_reached(
    monkeypatch: pytest.MonkeyPatch, ingresses: list[IngressReport], way: str
) -> None:
    found = SimpleNamespace(models=Remote(["m"]), ingresses=Remote(ingresses))
    monkeypatch.setattr(cluster, "join_cluster", lambda address: None)
    monkeypatch.setattr(directory_module, "find_directory", lambda name: found)
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: HERE))
    monkeypatch.setattr(job_engines, "_open_generator", lambda directory, model: nullcontext(OWN))
    monkeypatch.setattr(first_rows, "open_first_rows", lambda address, own: nullcontext(address))
    settings = {"name": "j", "model": "m", "task": "generate", "prompt": "{t}", "engine": "shared"}
    job = Job.model_validate({**settings, "input": {"path": "in"}, "output": {"path": "out"}})
    with job_engines.open_engines(job, None, None) as connect:
        opened: Any = connect()
        with opened as asked:
            assert asked == way
