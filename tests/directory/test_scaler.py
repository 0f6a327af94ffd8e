"""The policy as Serve calls it, with a directory that is plain Python; and what Serve is told to do with it."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.serve.config import AutoscalingConfig

from hycluster.directory import scaler
from hycluster.directory.autoscaling import Scaling
from hycluster.directory.directory import Demand, Directory
from hycluster.directory.scaler import LOGGER, Scaler, autoscaling_config
from hycluster.settings.model import Model
from hycluster.settings.parallel import Parallel
from hycluster.settings.pool import Autoscaling, Replicas
from tests.waiting import eventually

MODEL = Model(
    name="m",
    source="/m",
    replicas=Replicas(min=0, max=3),
    autoscaling=Autoscaling(target_outstanding_tokens=100, scale_up_after_s=0, scale_to_zero_after_s=0),
)


class Serve:
    """Calls the policy as Serve does, and does what it says; replicas start when they are told to."""

    def __init__(self, there: Directory | None) -> None:
        self.there = there
        self.target = self.running = 0
        self.policy = Scaler(
            model="m",
            directory="d",
            replicas=MODEL.replicas.model_dump(),
            autoscaling=MODEL.autoscaling.model_dump(),
            ranks=1,
        )

    def tick(self) -> int:
        ctx: Any = SimpleNamespace(target_num_replicas=self.target, running_replicas=["r"] * self.running)
        self.target, state = self.policy(ctx)
        assert state == {}
        return self.target

    def want(self, waiting: int = 0, tokens: int = 0) -> None:
        assert self.there is not None
        self.there.sync("m", "g", {}, {}, Demand(MODEL, waiting, tokens))

    @property
    def heard(self) -> bool:
        return self.policy._exchange.heard is not None

    @property
    def said(self) -> Scaling:
        assert self.there is not None
        scaling = self.there.view("m").scaling
        assert scaling is not None
        return scaling


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Asks fifty times a second; the fake of Ray answers at once."""
    found = Serve.__new__(Serve)

    def find(name: str) -> Any:
        if found.there is None:
            raise ValueError("no such actor")
        return SimpleNamespace(scale=SimpleNamespace(remote=found.there.scale))

    monkeypatch.setattr(scaler, "find_directory", find)
    monkeypatch.setattr(scaler, "REPORT_EVERY_S", 0.02)
    fake = SimpleNamespace(get=lambda answer, timeout: answer, exceptions=ray.exceptions)
    monkeypatch.setattr(scaler, "ray", fake)
    found.__init__(Directory())  # type: ignore[misc]
    yield found
    found.policy._exchange.ended.set()


def test_what_waits_at_an_ingress_process_wakes_the_pool(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        assert serve.tick() == 0
        serve.want(waiting=2, tokens=150)
        eventually(lambda: serve.tick() == 2)
    assert caplog.messages == ["m: from 0 to 2 replicas because 2 requests wait"]
    eventually(lambda: serve.tick() == 2 and serve.said.decisions == {"wake": 1})
    assert (serve.said.target, serve.said.running) == (2, 0)


def test_a_start_is_timed_from_the_decision_on(serve: Serve) -> None:
    serve.want(waiting=1, tokens=1)
    begun = time.monotonic()
    eventually(lambda: serve.tick() == 1)
    serve.tick()
    time.sleep(0.1)
    serve.tick()
    eventually(lambda: (serve.said.starting_for_s or 0) >= 0.1)
    assert serve.said.cold_start_s is None
    serve.running = 1
    serve.tick()
    took = time.monotonic() - begun
    eventually(lambda: serve.said.cold_start_s is not None)
    assert 0.1 <= (serve.said.cold_start_s or 0) <= took
    assert serve.said.starting_for_s is None


def test_replicas_that_an_upgrade_replaces_tell_nothing_of_a_start(serve: Serve) -> None:
    serve.target = 3
    for serve.running in (3, 2, 3, 2, 3):
        serve.tick()
    eventually(lambda: serve.heard)
    assert serve.said.cold_start_s is None
    # One that nobody else stands in for does.
    serve.target = 1
    for serve.running in (1, 0, 1):
        serve.policy._target = serve.target
        serve.tick()
    eventually(lambda: serve.said.cold_start_s is not None)


def test_a_successor_knows_how_long_its_predecessors_starts_took(serve: Serve) -> None:
    assert serve.there is not None
    serve.there.sync("m", "g", {}, {}, Demand(MODEL, cold_start_s=43.0))
    serve.tick()
    eventually(lambda: serve.tick() == 0 and serve.heard and serve.said.cold_start_s == 43.0)


def test_down_to_zero_when_nobody_asks(serve: Serve) -> None:
    serve.target = serve.running = 1
    serve.tick()
    serve.want()
    eventually(lambda: serve.tick() == 0)
    eventually(lambda: serve.said.decisions == {"idle": 1})


def test_without_a_directory_all_stays_as_it_is(serve: Serve) -> None:
    there, serve.there = serve.there, None
    serve.target = 2
    for _ in range(10):
        assert serve.tick() == 2
        time.sleep(0.01)
    # One that starts again is found again.
    serve.there = there
    serve.want(tokens=1)
    eventually(lambda: bool(serve.there and serve.there.view("m").scaling))


def test_the_thread_ends_with_the_policy(serve: Serve) -> None:
    ended = serve.policy._exchange.ended
    serve.policy = None  # type: ignore[assignment]
    gc.collect()
    assert ended.is_set()
    serve.policy = SimpleNamespace(_exchange=SimpleNamespace(ended=ended))  # type: ignore[assignment]


def test_what_serve_is_told() -> None:
    model = MODEL.model_copy(update={"replicas": Replicas(min=1, max=4, initial=2), "parallel": Parallel(data=2)})
    config = autoscaling_config(model, "d", keep_count=False)
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (1, 2, 4)
    # It waits for nothing that the policy has not waited for.
    assert (config.upscale_delay_s, config.downscale_delay_s, config.downscale_to_zero_delay_s) == (0, 0, 0)
    assert autoscaling_config(model, "d", keep_count=True).initial_replicas is None
    # As it is in the controller: out of bytes, made by its keyword arguments.
    again = AutoscalingConfig(**config.model_dump(exclude={"policy"}), policy=config.policy)
    policy = again.policy.get_policy()(**again.policy.policy_kwargs)
    policy._exchange.ended.set()
    assert policy(SimpleNamespace(target_num_replicas=2, running_replicas=[])) == (2, {})
