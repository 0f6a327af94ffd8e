"""How one replica's engine is split over devices."""

from __future__ import annotations

from pydantic import Field, model_validator

from hycluster.settings.base import Strict


class Eplb(Strict):
    """Expert parallel load balancing (EPLB): vLLM moves and copies experts to balance the load of the ranks.

    Attributes:
        enabled: balance experts; needs ``expert: true`` and GPUs.
        redundant_experts: copies of busy experts, in all ranks together.
        window_size: engine steps over which the load of experts is measured.
        step_interval: engine steps between two rearrangements.
    """

    enabled: bool = False
    redundant_experts: int = Field(default=0, ge=0)
    window_size: int = Field(default=1000, ge=1)
    step_interval: int = Field(default=3000, ge=1)

    @model_validator(mode="after")
    def _redundant_when_enabled(self) -> Eplb:
        if self.redundant_experts and not self.enabled:
            raise ValueError(f"redundant_experts: {self.redundant_experts} is without effect; set enabled to true")
        return self


class Parallel(Strict):
    """How one replica's engine is split over devices. Its device count is tensor x pipeline x data.

    Attributes:
        tensor: tensor-parallel ranks: each layer is split over them.
        pipeline: pipeline-parallel stages: each has some of the layers.
        data: data-parallel ranks: each has requests and attention of its own; they share the experts.
        expert: expert parallel: each of the tensor x data ranks holds some experts whole. False: each expert is split
            over all of them.
    """

    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    data: int = Field(default=1, ge=1)
    expert: bool = False
    eplb: Eplb = Eplb()

    @model_validator(mode="after")
    def _experts_to_balance(self) -> Parallel:
        if self.eplb.enabled and not self.expert:
            raise ValueError("eplb.enabled: true is not allowed; needs expert: true")
        if self.eplb.enabled and self.expert_ranks == 1:
            raise ValueError("eplb.enabled: true is not allowed; needs more ranks than one (tensor, data)")
        return self

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def devices_per_rank(self) -> int:
        """Devices of one data-parallel rank."""
        return self.tensor * self.pipeline

    @property
    def expert_ranks(self) -> int:
        """Ranks that a layer's experts are spread over."""
        return self.tensor * self.data
