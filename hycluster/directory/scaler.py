"""Ray Serve's autoscaling policy of one pool: hears of the load from the directory, says how many replicas are to be.

Serve calls it in its controller's loop, which must not wait. So a thread asks the directory and tells it what was
decided; the policy only looks at what was last heard. Serve's own counts of requests are of no use here, as requests
go past its handles, and batch jobs ask too. Serve sends this module to its controller as it is: keep it small, and all
that others need in ``hycluster/directory/autoscaling.py``.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from dataclasses import replace
from typing import Any

import ray
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from hycluster.directory.autoscaling import Memory, PoolLoad, Scaling, decide
from hycluster.directory.directory import FORGET_AFTER_S, REPORT_EVERY_S, find_directory
from hycluster.settings.model import Model
from hycluster.settings.pool import Autoscaling, Replicas

# Serve's own, so that the lines are where Serve tells of its replicas, in the controller's log.
LOGGER = "ray.serve.hycluster"


def autoscaling_config(model: Model, directory: str, *, keep_count: bool) -> AutoscalingConfig:
    """What Serve is to do with a pool that follows its load.

    Args:
        directory: name of the directory that knows the load.
        keep_count: go on with as many replicas as there are, if there are any.
    """
    replicas = model.replicas
    return AutoscalingConfig(
        min_replicas=replicas.min,
        initial_replicas=None if keep_count else replicas.count,
        max_replicas=replicas.most,
        # The policy has its own.
        upscale_delay_s=0,
        downscale_delay_s=0,
        downscale_to_zero_delay_s=0,
        policy=AutoscalingPolicy(
            policy_function=f"{__name__}:Scaler",
            policy_kwargs={
                "model": model.name,
                "directory": directory,
                "replicas": replicas.model_dump(),
                "autoscaling": model.autoscaling.model_dump(),
                "ranks": model.parallel.data,
            },
        ),
    )


class Exchange:
    """What the policy and the thread that asks have of each other. Whole objects are put in and taken out."""

    def __init__(self) -> None:
        self.heard: tuple[float, PoolLoad] | None = None
        self.say: Scaling | None = None
        self.ended = threading.Event()


def keep_asking(exchange: Exchange, model: str, directory: str) -> None:
    """Tell the directory what was decided, hear what there is to do; until the policy is gone."""
    there: Any = None
    while not exchange.ended.wait(REPORT_EVERY_S):
        if exchange.say is None:
            continue
        try:
            there = there or find_directory(directory)
            load = ray.get(there.scale.remote(model, exchange.say), timeout=FORGET_AFTER_S)
        except (ValueError, ray.exceptions.RayError):
            # It is not there yet, or is starting again; who decides goes on with what there is.
            there = None
            continue
        exchange.heard = time.monotonic(), load


class Scaler:
    """The policy. Serve makes one a deployment, and a new one when the deployment changes.

    Args:
        replicas, autoscaling: the model's settings of these names.
        ranks: engines of one replica.
    """

    def __init__(
        self, *, model: str, directory: str, replicas: dict[str, Any], autoscaling: dict[str, Any], ranks: int
    ) -> None:
        self._model = model
        self._replicas = Replicas(**replicas)
        self._rules = Autoscaling(**autoscaling)
        self._ranks = ranks
        self._memory = Memory()
        self._looked_s = 0.0
        self._target: int | None = None
        self._begun_s: float | None = None
        self._timed = False
        # Replicas that ran, and that were wanted, when Serve last asked.
        self._before: tuple[int, int] | None = None
        self._cold_start_s: float | None = None
        self._decisions: dict[str, int] = {}
        self._exchange = Exchange()
        weakref.finalize(self, self._exchange.ended.set)
        threading.Thread(
            target=keep_asking, args=(self._exchange, model, directory), name=f"scaler {model}", daemon=True
        ).start()

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Serve asks ten times a second."""
        now_s = time.monotonic()
        running = len(ctx.running_replicas)
        self._time_starts(running, ctx.target_num_replicas, now_s)
        target = ctx.target_num_replicas if self._target is None else self._target
        heard = self._exchange.heard
        if heard is not None and heard[0] > self._looked_s:
            self._looked_s, load = heard
            target = self._decide(load, ctx.target_num_replicas, running, now_s)
        self._target = target
        starting_for_s = None if self._begun_s is None else now_s - self._begun_s
        self._exchange.say = Scaling(target, running, starting_for_s, self._cold_start_s, dict(self._decisions))
        return target, {}

    def _decide(self, load: PoolLoad, target: int, running: int, now_s: float) -> int:
        if self._cold_start_s is None:
            # Of a predecessor, by way of those whom it told.
            self._cold_start_s = load.cold_start_s
        decision = decide(
            replace(load, cold_start_s=self._cold_start_s),
            target=target,
            running=running,
            replicas=self._replicas,
            rules=self._rules,
            ranks=self._ranks,
            memory=self._memory,
            now_s=now_s,
        )
        self._memory = decision.memory
        if decision.target != target:
            self._decisions[decision.cause] = self._decisions.get(decision.cause, 0) + 1
            logging.getLogger(LOGGER).info(
                "%s: from %d to %d replicas because %s", self._model, target, decision.target, decision.reason
            )
        return decision.target

    def _time_starts(self, running: int, target: int, now_s: float) -> None:
        """From the moment that more are wanted than run, until there is one more."""
        before, self._before = self._before, (running, target)
        if self._begun_s is not None and before is not None and running > before[0]:
            if self._timed:
                self._cold_start_s = now_s - self._begun_s
            self._begun_s = None
        if running >= target:
            self._begun_s = None
        elif self._begun_s is None:
            self._begun_s = now_s
            # In an upgrade one goes as another one comes, whose start began before.
            self._timed = running == 0 or (before is not None and target > before[1])
