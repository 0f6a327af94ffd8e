"""LoRA adapters over HTTP while the cluster runs: vLLM's two routes, over a pool and at every ingress process.

Open with ``http.control_routes`` only: whoever may load an adapter may have every replica read a path.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

from hycluster.errors import InvalidInput
from hycluster.gateway.generation import Generator

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class LoadAdapter(LoadLoRAAdapterRequest):
    """vLLM's request, and whose adapter it is where several models take adapters."""

    model: str | None = None


def adapter_routes(generator: Generator) -> APIRouter:
    """``POST /v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``. Errors are the generator's."""
    routes = APIRouter()

    @routes.post(LOAD)
    async def load(request: LoadAdapter, _: Request) -> PlainTextResponse:
        if request.is_3d_lora_weight:
            raise InvalidInput("is_3d_lora_weight: True is not allowed; must be False")
        source = await asyncio.to_thread(_absolute, request.lora_path)
        await generator.load_adapter(request.lora_name, source, model=request.model, replace=request.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' added successfully.")

    @routes.post(UNLOAD)
    async def unload(request: UnloadLoRAAdapterRequest, _: Request) -> PlainTextResponse:
        await generator.unload_adapter(request.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")

    return routes


def _absolute(path: str) -> str:
    """A folder by the name that it has for every process; what is no folder may be a hub id."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if path and folder.is_dir() else path
