from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hycluster.engine.patches.adapter_loading import AdaptersFirst

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]


class Calls(list[Any]):
    """What the engine core below was asked for, in order."""


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def core(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> AdaptersFirst:
    """An engine core without an engine: adapter 3 can't be loaded, and there is room for two."""
    from vllm.v1.engine.core import EngineCoreProc

    from hycluster.engine.patches.adapter_loading import AdaptersFirst

    def add_lora(_: object, wanted: Any) -> None:
        calls.append(("load", wanted.lora_int_id))
        if wanted.lora_int_id == 3:
            raise ValueError("no such folder")

    def refuse(_: object, request_ids: list[str], client: int) -> None:
        calls.append(("refuse", *request_ids, client))

    def schedule(_: object, request: Any, wave: int) -> None:
        calls.append(("schedule", request.request_id))

    monkeypatch.setattr(EngineCoreProc, "__init__", lambda *_: None)
    monkeypatch.setattr(EngineCoreProc, "add_lora", add_lora)
    monkeypatch.setattr(EngineCoreProc, "remove_lora", lambda *_: True)
    monkeypatch.setattr(EngineCoreProc, "_send_error_outputs_to_client", refuse)
    monkeypatch.setattr(EngineCoreProc, "add_request", schedule)
    made: Any = AdaptersFirst()
    made.vllm_config = SimpleNamespace(lora_config=SimpleNamespace(max_cpu_loras=2, max_loras=1))
    return made  # type: ignore[no-any-return]


def request(name: str, adapter: int | None = None) -> Any:
    lora = SimpleNamespace(lora_int_id=adapter, lora_name=f"a{adapter}") if adapter is not None else None
    return SimpleNamespace(request_id=name, client_index=7, lora_request=lora)


def test_an_adapter_is_loaded_once_and_before_its_request(core: AdaptersFirst, calls: Calls) -> None:
    for name, adapter in (("p", None), ("q", 1), ("r", 1)):
        core.add_request(request(name, adapter))
    assert calls == [("schedule", "p"), ("load", 1), ("schedule", "q"), ("schedule", "r")]


def test_one_that_is_broken_ends_its_request_alone(core: AdaptersFirst, calls: Calls) -> None:
    core.add_request(request("q", 3))
    core.add_request(request("r", 1))
    assert calls == [("load", 3), ("refuse", "q", 7), ("load", 1), ("schedule", "r")]


def test_what_may_have_been_pushed_out_is_loaded_again(core: AdaptersFirst, calls: Calls) -> None:
    for adapter in (1, 2, 4, 1):
        core.add_request(request("r", adapter))
    core.remove_lora(1)
    core.add_request(request("r", 1))
    assert [call for call in calls if call[0] == "load"] == [("load", adapter) for adapter in (1, 2, 4, 1, 1)]


def test_vllms_own_still_loads_within_a_step() -> None:
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    assert "self.add_request(" in inspect.getsource(EngineCoreProc._handle_client_request)
    assert "set_active_adapters" in inspect.getsource(LoRAModelRunnerMixin._set_active_loras)
    assert "lora" not in inspect.getsource(EngineCore.add_request)
    assert {"add_lora", "remove_lora"} <= set(dir(EngineCoreProc))
