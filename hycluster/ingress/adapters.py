"""LoRA adapters over HTTP while the cluster runs: vLLM's two routes, over a pool and at every ingress process.

Whoever may load an adapter may have every replica read a path. So these are open with ``http.control_routes``, to
administrators where callers are asked who they are; and with ``auth.adapter_folder`` to keys with the scope
``adapters``, below their project's own folder alone.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

from hycluster.adapters import LOAD, UNLOAD, adapter_owner, name_in_full, public_name
from hycluster.auth.caller import Caller, check_scope, current_caller
from hycluster.errors import InvalidInput, UnknownModel, shown
from hycluster.gateway.generation import Generator


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
        name, source = request.lora_name, request.lora_path
        project = _for_project()
        if project is None:
            source = await asyncio.to_thread(_absolute, source)
        elif adapter_owner(name) is not None:
            raise InvalidInput(f"lora_name: {shown(name)} is not allowed; it is your project's anyhow")
        else:
            source = await asyncio.to_thread(_in_own_folder, source, generator.adapter_folder, project)
            name = name_in_full(name, project.owner)
        await generator.load_adapter(name, source, model=request.model, replace=request.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' added successfully.")

    @routes.post(UNLOAD)
    async def unload(request: UnloadLoRAAdapterRequest, _: Request) -> PlainTextResponse:
        name, project = request.lora_name, _for_project()
        if project is not None:
            if adapter_owner(name) is not None:
                raise UnknownModel(name, list(generator.served))
            name = name_in_full(name, project.owner)
        await generator.unload_adapter(name)
        return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")

    return routes


def called_as_by_callers(models: Any) -> None:
    """Have vLLM's app say names of adapters as callers do, in answers and in the list."""
    name_of, listed = models.model_name, models.show_available_models

    def model_name(lora_request: Any = None) -> str:
        return public_name(name_of(lora_request))

    async def show_available_models() -> Any:
        cards = await listed()
        for card in cards.data:
            card.id = public_name(card.id)
        return cards

    models.model_name, models.show_available_models = model_name, show_available_models


def _for_project() -> Caller | None:
    """For whose project alone it is; None: for all, as administrators do."""
    caller = current_caller.get()
    if caller is None or "admin" in caller.scopes:
        return None
    check_scope("adapters", LOAD)
    return caller


def _absolute(path: str) -> str:
    """A folder by the name that it has for every process; what is no folder may be a hub id."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if path and folder.is_dir() else path


def _in_own_folder(path: str, root: str | None, project: Caller) -> str:
    """The same, of a folder below the project's own; nothing is said of what else there is.

    Raises:
        InvalidInput: there is none.
    """
    if root is None:
        raise InvalidInput("lora_path: projects have no folder here; the settings name one as auth.adapter_folder")
    own = Path(root, project.tenant, project.project).resolve()
    try:
        folder = Path(own, path).resolve()
        # What is in it may be a way out, too.
        if folder.is_dir() and all(each.resolve().is_relative_to(own) for each in (folder, *folder.rglob("*"))):
            return str(folder)
    except (OSError, ValueError):
        pass
    raise InvalidInput(f"lora_path: {shown(path)} is not allowed; must be a folder below your project's own, {own}")
