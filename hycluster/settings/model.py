"""One model and its pool."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from hycluster.settings.api import check_api
from hycluster.settings.base import Name, Strict
from hycluster.settings.parallel import Parallel
from hycluster.settings.pool import Autoscaling, Hardware, Health, Replicas
from hycluster.settings.price import Price
from hycluster.settings.simulated import Simulated


class Adapter(Strict):
    """A LoRA adapter in PEFT's format, on all replicas of a model.

    Attributes:
        name: the ``model`` of a request.
        source: a folder that every node sees, or a hub id. Give changed weights another source: caches are keyed by
            name and source.
    """

    name: Name
    source: str = Field(min_length=1)


class Recycle(Strict):
    """Random compensation: tokens beyond an expert's capacity go to experts that have room.

    Attributes:
        capacity_factor: an expert's capacity in a step, as a multiple of its fair share of the step's tokens.
        min_capacity_tokens: lower bound of the capacity. In a small decode batch an expert's time is that of reading
            its weights, however many tokens it has, so moving tokens there costs quality and gains nothing.
        seed: of the random choice; the same batch, seed and factor give the same experts.
    """

    capacity_factor: float = Field(default=1.0, gt=0, le=1024)
    min_capacity_tokens: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)


class Routing(Strict):
    """How a mixture-of-experts model chooses its experts (models of ``hycluster/models``).

    Attributes:
        recycle: random compensation; None is plain top-k. With it an output depends on what else is in the batch.
        expert_metrics: count tokens for each expert, under ``/metrics``.
    """

    recycle: Recycle | None = None
    expert_metrics: bool = False


class Colocation(Strict):
    """How online and bulk work share an engine: online work first, bulk in what it leaves.

    Attributes:
        enabled: False leaves the engine's own scheduler, which lets online callers wait for bulk rows.
        max_step_s: what an online arrival may have to wait for: steps without online work are cut to it. Longer steps
            give bulk work more throughput where a step's time grows with its rows.
        max_slowdown: share by which bulk rows may lengthen the time of steps with online work; 0 keeps them out.
        min_batch_share: share of the engine's time that bulk work gets even where online work never pauses. It
            lengthens online steps, also beyond ``max_slowdown``; 0 lets bulk work wait for as long as it takes.
        keep_sessions_s: how much later than it was a KV block counts as used if a request with ``session_id`` leaves
            it, so that it is there for the session's next turn; at most half of the KV cache. 0: like all others.
    """

    enabled: bool = True
    max_step_s: float = Field(default=0.25, gt=0, le=60)
    max_slowdown: float = Field(default=0.1, ge=0, le=10)
    min_batch_share: float = Field(default=0.0, ge=0, lt=1)
    keep_sessions_s: float = Field(default=60.0, ge=0, le=3600)


class Model(Strict):
    """One model and its pool.

    Attributes:
        name: the ``model`` of a request.
        source: a path, a hub id, or ``package:NAME`` for weights that a Python package ships.
        engine: any argument of vLLM's engine, by its Python name.
        api: arguments of vLLM's API server that belong to the model (``tool_call_parser``, ``reasoning_parser``,
            ``chat_template``, ...), by their Python names. Templates and parsers act at every entrance, the others
            over HTTP. What belongs to the server as a whole is refused. The two parsers are found by themselves
            (``auto``) for models whose chat template or type tells their form; null is none.
        adapters: LoRA adapters, each served under its own name beside the model.
        routing: how a mixture-of-experts model chooses its experts.
        colocation: how online and bulk work share its engines.
        health: when a replica counts as unhealthy and is replaced.
        autoscaling: when replicas are added and removed.
        price: what its tokens and its adapters' cost, for budgets and usage; null is nothing.
        simulated: replaces the engine by a timing model, for tests and simulation.
    """

    name: Name
    source: str = Field(min_length=1)
    engine: dict[str, Any] = Field(default_factory=dict)
    api: dict[str, Any] = Field(default_factory=dict)
    parallel: Parallel = Parallel()
    hardware: Hardware = Hardware()
    replicas: Replicas = Replicas()
    adapters: tuple[Adapter, ...] = ()
    routing: Routing = Routing()
    colocation: Colocation = Colocation()
    health: Health = Health()
    autoscaling: Autoscaling = Autoscaling()
    price: Price | None = None
    simulated: Simulated | None = None

    @model_validator(mode="after")
    def _api_acts(self) -> Model:
        check_api(self.api)
        if self.api.get("reasoning_parser") is not None and "reasoning_parser" in self.engine:
            raise ValueError("engine.reasoning_parser: is set by 'api.reasoning_parser'; remove it here")
        return self

    @model_validator(mode="after")
    def _simulated_has_no_adapters(self) -> Model:
        if self.simulated is not None and self.adapters:
            raise ValueError(f"adapters: {self.adapters[0].name!r} is not allowed; a simulated engine has no adapters")
        return self

    @model_validator(mode="after")
    def _autoscaling_has_room(self) -> Model:
        if self.autoscaling.model_fields_set and not self.replicas.vary:
            name = min(self.autoscaling.model_fields_set)
            raise ValueError(
                f"autoscaling.{name}: is without effect; set replicas.max above replicas.min ({self.replicas.min})"
            )
        return self

    @property
    def engines(self) -> int:
        """Most engines that requests go to: every data-parallel rank of every replica is one."""
        return self.replicas.most * self.parallel.data

    @property
    def sleeps(self) -> bool:
        """Its pool may have no replica, in good order; a request wakes it."""
        return self.replicas.min == 0

    @property
    def names(self) -> tuple[str, ...]:
        """What callers may put in ``model`` to reach this pool."""
        return self.name, *(adapter.name for adapter in self.adapters)
