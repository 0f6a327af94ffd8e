"""The layer as an ingress process has it, with what it does beside."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp

from hycluster.ingress.schema import WithSchema
from hycluster.responses.app import WithResponses
from hycluster.responses.background import Background
from hycluster.responses.store import ResponseStore
from hycluster.settings.settings import Settings


def response_store(settings: Settings) -> ResponseStore | None:
    """Where these settings have responses kept; None if they are not."""
    if settings.responses is None or settings.batches is None:
        return None
    return ResponseStore(settings.responses, settings.batches)


class ServedResponses:
    """From the opening of an ingress process to its end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._background: Background | None = None
        self._running: asyncio.Task[None] | None = None

    def before(self, app: ASGIApp) -> ASGIApp:
        """The layer before vLLM's app over all models. From now on this process answers what others have left."""
        settings, store = self._settings, response_store(self._settings)
        if store is not None and settings.responses is not None:
            self._background = Background(
                app,
                store,
                settings.responses,
                retry_for_s=settings.start_timeout_s,
                max_bytes=settings.http.max_bodies_mib << 20,
            )
            self._running = asyncio.create_task(self._background.run())
        layer = WithResponses(app, store, self._background, settings.http, settings.admission.max_members)
        return layer if layer.routes is None else WithSchema(layer, layer.routes)

    async def close(self, timeout_s: float) -> None:
        """Let what is answered in the background end within a time, and leave the rest to other ingress processes."""
        if self._background is not None and self._running is not None:
            await self._background.close(timeout_s)
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running
