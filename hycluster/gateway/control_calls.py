"""The control calls of an engine core, made on every replica of a pool."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any


class ControlCalls:
    """What ``AsyncLLM`` asks of its engine-core client beside requests. Each call goes to all replicas."""

    @abstractmethod
    async def call_all(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all replicas to one call."""

    async def reset_prefix_cache_async(self, reset_running: bool = False, reset_connector: bool = False) -> bool:
        return all(await self.call_all("reset_prefix_cache", reset_running, reset_connector))

    async def reset_mm_cache_async(self) -> None:
        await self.call_all("reset_mm_cache")

    async def reset_encoder_cache_async(self) -> None:
        await self.call_all("reset_encoder_cache")

    async def pause_scheduler_async(self, mode: str = "abort", clear_cache: bool = True) -> None:
        await self.call_all("pause_scheduler", mode, clear_cache)

    async def resume_scheduler_async(self) -> None:
        await self.call_all("resume_scheduler")

    async def is_scheduler_paused_async(self) -> bool:
        return all(await self.call_all("is_scheduler_paused"))

    async def sleep_async(self, level: int = 1, mode: str = "abort") -> None:
        await self.call_all("sleep", level, mode)

    async def wake_up_async(self, tags: list[str] | None = None) -> bool:
        return all(await self.call_all("wake_up", tags))

    async def is_sleeping_async(self) -> bool:
        return all(await self.call_all("is_sleeping"))

    async def profile_async(self, is_start: bool = True, *arguments: Any) -> None:
        await self.call_all("profile", is_start, *arguments)

    async def add_lora_async(self, lora_request: Any) -> bool:
        return all(await self.call_all("add_lora", lora_request))

    async def remove_lora_async(self, lora_id: int) -> bool:
        return all(await self.call_all("remove_lora", lora_id))

    async def list_loras_async(self) -> set[int]:
        return set.intersection(*(set(ids) for ids in await self.call_all("list_loras")))

    async def pin_lora_async(self, lora_id: int) -> bool:
        return all(await self.call_all("pin_lora", lora_id))
