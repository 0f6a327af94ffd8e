"""The LoRA adapters of one model: loaded into all of its replicas, offered at all ingress processes.

The processes agree on them by the directory: each says what it knows at every sync, and takes over what others know.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from vllm.lora.request import LoRARequest

from hycluster.adapters import AdapterEntry, AdapterTable, CallersAdapters, adapter_id, adapter_owner
from hycluster.directory.directory import REPORT_EVERY_S
from hycluster.errors import InvalidInput, Unavailable, shown
from hycluster.gateway.pool import PoolClient
from hycluster.settings.model import Model

logger = logging.getLogger(__name__)

# Names of adapters of one project that are remembered, those of unloaded ones too.
MAX_OF_PROJECT = 100


class PoolAdapters:
    """What one gateway knows of them.

    Args:
        takes: the model can have adapters.
        say: has the directory hear now what is known here.

    Attributes:
        requests: by the name by which the caller calls it, what a request to an adapter of this model carries. Changes
            in place.
    """

    def __init__(self, model: Model, pool: PoolClient, *, takes: bool, say: Callable[[], Awaitable[None]]) -> None:
        self._all: dict[str, LoRARequest] = {}
        self.requests = CallersAdapters(self._all)
        self._model = model
        self._pool = pool
        self._takes = takes
        self._say = say
        self._table = AdapterTable(model.adapters)
        self.take_over({})

    @property
    def words(self) -> dict[str, AdapterEntry]:
        """What is known here, as the directory takes it."""
        return self._table.words

    def take_over(self, words: dict[str, AdapterEntry]) -> None:
        """Hear what others know."""
        self._table.merge(words)
        sources = self._table.sources
        for name in self._all.keys() - sources.keys():
            del self._all[name]
        for name, source in sources.items():
            if (known := self._all.get(name)) is None or known.lora_path != source:
                self._all[name] = LoRARequest(
                    lora_name=name,
                    lora_int_id=adapter_id(name, source),
                    lora_path=source,
                    base_model_name=self._model.name,
                )

    def source_of(self, name: str) -> str | None:
        """Where the adapter is that goes by this name in full; None: there is none."""
        request = self._all.get(name)
        return None if request is None else request.lora_path

    async def load(self, name: str, source: str) -> None:
        """Load an adapter into every replica, then offer it at every ingress process; returns when all ingress
        processes have heard.

        A name that is in use goes over to the new source. Replicas that start later load it at its first request.

        Raises:
            InvalidInput: the model takes no adapters, or a replica can't load this one; then nothing has changed.
            Unavailable: no replica can serve, or one did not answer.
        """
        if not self._takes:
            raise InvalidInput(
                f"model: {self._model.name!r} takes no adapters; its settings must have adapters or engine.enable_lora"
            )
        owner = adapter_owner(name)
        others = sum(adapter_owner(each) == owner for each in self._table.words.keys() - {name})
        if owner is not None and others >= MAX_OF_PROJECT:
            raise InvalidInput(f"lora_name: {owner} has had {MAX_OF_PROJECT} names already; use one of them again")
        request = LoRARequest(lora_name=name, lora_int_id=adapter_id(name, source), lora_path=source)
        try:
            await self._pool.add_lora_async(request)
        except TimeoutError:
            raise Unavailable(f"lora_path: a replica did not load {shown(source)} in time") from None
        except RuntimeError as error:
            # What the engine said; some replicas may have it already, which costs memory and nothing else.
            raise InvalidInput(f"lora_path: {shown(source)} can't be loaded: {error}") from None
        await self._announce(name, source)

    async def unload(self, name: str) -> None:
        """Offer an adapter no more, at any ingress process; requests that run go on. Returns when all ingress processes
        have heard.

        Raises:
            KeyError: there is none of that name.
        """
        request = self._all[name]
        await self._announce(name, None)
        try:
            await self._pool.remove_lora_async(request.lora_int_id)
        except (RuntimeError, TimeoutError, Unavailable):
            # It stays in that engine until others push it out.
            logger.warning("adapter %s could not be taken out of every replica", name, exc_info=True)

    async def _announce(self, name: str, source: str | None) -> None:
        self._table.say(name, source, self._pool.gateway_id)
        self.take_over({})
        await self._say()
        # The other ingress processes hear of it at their next sync.
        await asyncio.sleep(2 * REPORT_EVERY_S)
