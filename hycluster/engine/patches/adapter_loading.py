"""A request's adapter is loaded before the request is scheduled.

What: an engine core that loads the adapter of a request as it is added; one that can't be loaded ends the request.
Why: vLLM loads adapters within a step, where an error ends the engine and every request on it.
Upstream: none open. vllm-project/vllm#11727 (merged) has the route that loads an adapter try it first; an adapter of a
request itself, or one that has been pushed out and is gone from its folder, still ends the engine.
Version: vLLM 0.32.0. The engine core of hycluster is a subclass. Watched by
``tests/engine/patches/test_adapter_loading.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import logging
from typing import Any

from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class AdaptersFirst(EngineCoreProc):
    """vLLM's engine core, which loads a request's adapter first."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._adapters: set[int] = set()
        super().__init__(*arguments, **named)

    def add_request(self, request: Request, request_wave: int = 0) -> None:
        wanted, lora = request.lora_request, self.vllm_config.lora_config
        if wanted is not None and lora is not None and wanted.lora_int_id not in self._adapters:
            if len(self._adapters) >= (lora.max_cpu_loras or lora.max_loras):
                # The engine drops the one that was used least recently; which one that is, it does not say.
                self._adapters.clear()
            try:
                self.add_lora(wanted)
            except Exception:
                logger.exception("request %s: adapter %s can't be loaded", request.request_id, wanted.lora_name)
                self._send_error_outputs_to_client([request.request_id], request.client_index)
                return
            self._adapters.add(wanted.lora_int_id)
        super().add_request(request, request_wave)

    def remove_lora(self, lora_id: int) -> bool:
        self._adapters.discard(lora_id)
        return super().remove_lora(lora_id)
