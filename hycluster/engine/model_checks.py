"""What a model's own configuration does not go with, as vLLM has read it: refused before an engine starts."""

from __future__ import annotations

import os
from typing import Any

from hycluster.errors import SettingsError
from hycluster.settings.model import Model


def check_media(name: str, config: Any) -> None:
    """Refuse a model that would fetch whatever address its callers name, within this network too.

    Raises:
        SettingsError: names the field and what is allowed.
    """
    if not config.supports_multimodal_inputs:
        return
    # For vLLM, none of them is all of them.
    if not config.allowed_media_domains:
        raise SettingsError(
            f"models: {name}: engine.allowed_media_domains: must be set for a model that takes media: the hosts that it"
            " may be sent to for them, at least one; data: URLs need none"
        )
    # Where an allowed host sends it on to is not looked at.
    os.environ.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")


def check_experts(model: Model, config: Any) -> None:
    """Refuse a cut that the model's experts do not allow.

    Raises:
        SettingsError: names the field, the value and what is allowed.
    """
    parallel, where = model.parallel, f"models: {model.name}: parallel"
    if not config.is_moe:
        if parallel.data > 1:
            raise SettingsError(
                f"{where}.data: {parallel.data} is not allowed; must be 1 for a model without experts"
                " (take more replicas: they share nothing)"
            )
        raise SettingsError(f"{where}.expert: true is not allowed; the model has no experts")
    if not parallel.expert:
        return
    experts, copies = config.get_num_experts(), parallel.eplb.redundant_experts
    if parallel.expert_ranks > experts + copies:
        raise SettingsError(
            f"{where}: tensor x data is {parallel.expert_ranks}; must be at most the model's {experts + copies} experts"
        )
    if parallel.eplb.enabled and (experts + copies) % parallel.expert_ranks:
        raise SettingsError(
            f"{where}.eplb.redundant_experts: {copies} is not allowed; with the model's {experts} experts it must"
            f" make a multiple of tensor x data ({parallel.expert_ranks})"
        )
