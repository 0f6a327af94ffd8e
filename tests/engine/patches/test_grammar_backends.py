from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Backend:
    def __init__(self, name: str) -> None:
        self.name = name
        self.destroyed = 0

    def destroy(self) -> None:
        self.destroyed += 1


class Manager:
    """In the place of vLLM's manager, which keeps its first backend; it compiles when a thread has time."""

    def __init__(self) -> None:
        self.backend: Any = None
        self.made: list[Backend] = []
        self.submitted: list[Callable[[], str]] = []

    def grammar_init(self, request: Any) -> None:
        if self.backend is None:
            if (name := request.sampling_params.structured_outputs._backend) == "nix":
                raise ValueError("Unsupported")
            self.backend = Backend(name)
            self.made.append(self.backend)
        create = self._create_grammar
        self.submitted.append(lambda: create(request))

    def _create_grammar(self, request: Any) -> str:
        return f"{request.request_id} by {self.backend.name}"

    def clear_backend(self) -> None:
        if self.backend is not None:
            self.backend.destroy()
            self.backend = None


def asking(request_id: str, backend: str) -> Any:
    params = SimpleNamespace(structured_outputs=SimpleNamespace(_backend=backend))
    return SimpleNamespace(request_id=request_id, sampling_params=params, structured_output_request=object())


@pytest.fixture
def manager() -> Any:
    from hycluster.engine.patches.grammar_backends import patch_backends

    made: Any = Manager()
    patch_backends(made)
    return made


def test_each_is_compiled_by_its_own(manager: Any) -> None:
    for number, backend in enumerate(["xgrammar", "guidance", "xgrammar", "guidance"]):
        manager.grammar_init(asking(f"r{number}", backend))
    assert [compile_it() for compile_it in manager.submitted] == [
        "r0 by xgrammar", "r1 by guidance", "r2 by xgrammar", "r3 by guidance",
    ]  # fmt: skip
    assert [backend.name for backend in manager.made] == ["xgrammar", "guidance"]


def test_one_that_is_not_there_leaves_the_others(manager: Any) -> None:
    manager.grammar_init(asking("r0", "xgrammar"))
    with pytest.raises(ValueError, match="Unsupported"):
        manager.grammar_init(asking("r1", "nix"))
    assert manager.backend.name == "xgrammar"


def test_all_are_cleared_once(manager: Any) -> None:
    for backend in ("xgrammar", "guidance"):
        manager.grammar_init(asking("r", backend))
    manager.clear_backend()
    assert [backend.destroyed for backend in manager.made] == [1, 1]
    manager.grammar_init(asking("r", "xgrammar"))
    assert len(manager.made) == 3


def test_what_asks_for_no_form_is_left_alone(manager: Any) -> None:
    request = asking("r", "xgrammar")
    request.structured_output_request = None
    manager.grammar_init(request)
    assert not manager.submitted


def test_vllms_own_still_has_one_for_all() -> None:
    from vllm.v1.structured_output import StructuredOutputManager

    init = inspect.getsource(StructuredOutputManager.grammar_init)
    assert "if self.backend is None:" in init
    assert "We only support a single backend" in init
    assert "self._create_grammar" in init
    assert "self.backend.compile_grammar(" in inspect.getsource(StructuredOutputManager._create_grammar)
    assert "self.backend.destroy()" in inspect.getsource(StructuredOutputManager.clear_backend)
