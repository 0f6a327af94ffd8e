"""Whether the model's pool and the ingress processes are whole, as the directory and the nodes say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from hycluster.chaos.targets import Target, Targets
from hycluster.directory.directory import PoolView, find_directory
from hycluster.errors import InvalidInput, Unavailable
from hycluster.settings.model import Model

ANSWER_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class PoolMembers:
    """Who is there.

    Attributes:
        replicas: who takes requests: names of groups, and ids of replicas of one engine.
        gateways: ids of those that follow the directory, an ingress process's among them.
    """

    wanted: int
    replicas: frozenset[str]
    gateways: frozenset[str] = frozenset()

    @property
    def whole(self) -> bool:
        return len(self.replicas) >= self.wanted

    def whole_without(self, before: PoolMembers, gone: int) -> bool:
        """Whether as many as are wanted are there, without ``gone`` of those before.

        The directory may name one that is dead for some seconds more, so that successors are counted.
        """
        new = len(self.replicas - before.replicas)
        kept = len(self.replicas & before.replicas)
        return new >= gone and new + kept >= self.wanted


def served_model(name: str) -> Model:
    """The settings of a model that the cluster serves, found by its name or an adapter's.

    Raises:
        Unavailable: no hycluster runs in this Ray cluster.
        InvalidInput: it serves no such model.
    """
    try:
        asked: Any = find_directory().find.remote(name)
        model: Model | None = ray.get(asked, timeout=ANSWER_TIMEOUT_S)
    except (ValueError, ray.exceptions.RayError):
        raise Unavailable("ray: no hycluster is running in this Ray cluster") from None
    if model is None:
        raise InvalidInput(f"model: {name!r} is not served in this Ray cluster")
    return model


def members(model: Model) -> PoolMembers | None:
    """Who is there; None while the directory does not answer."""
    try:
        asked: Any = find_directory().view.remote(model.name)
        view: PoolView = ray.get(asked, timeout=ANSWER_TIMEOUT_S)
    except (ValueError, ray.exceptions.RayError):
        return None
    there = frozenset(report.group or report.address.replica_id for report in view.replicas if report.accepting)
    gateways = frozenset(gateway for report in view.replicas for gateway in report.load.outstanding_tokens)
    # A pool that follows its load is whole when it has what it is to have now.
    wanted = view.scaling.target if view.scaling else model.replicas.count
    return PoolMembers(wanted, there, gateways)


@dataclass(frozen=True, slots=True)
class IngressProcesses:
    """How many ingress processes there are to be, and the ports that each listens on."""

    wanted: int
    ports: tuple[int, ...]

    def whole_without(
        self, targets: Targets, stopped: Sequence[Target], before: PoolMembers, now: PoolMembers, gone: int
    ) -> bool:
        """Whether as many as are wanted listen, without those that are stopped, and follow the directory.

        Args:
            gone: how many need a successor. One that has just started may listen only to say so.
        """
        if len(now.gateways - before.gateways) < gone:
            return False
        held_up = {target.actor_id for target in stopped}
        return sum(ingress.actor_id not in held_up for ingress in targets.listening(self.ports)) >= self.wanted
