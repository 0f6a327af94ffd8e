"""Looking after a service, without one."""

from __future__ import annotations

import threading

import pytest

from hycluster.serving import service
from hycluster.serving.service import Service


def test_what_it_does_not_understand_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end is the service's. It is said once, until there is something else to say."""
    said: list[str] = []
    stopping = threading.Event()
    looks = iter([KeyError("pid"), KeyError("pid"), None, ValueError("odd"), None])

    def look() -> None:
        answer = next(looks, None)
        if answer is not None:
            raise answer
        if not said[1:]:
            return
        stopping.set()

    serving = object.__new__(Service)
    monkeypatch.setattr(serving, "_say", said.append, raising=False)
    monkeypatch.setattr(serving, "_look", look)
    monkeypatch.setattr(service, "LOOK_EVERY_S", 0.001)
    serving.attend(stopping)
    assert said == [
        "can't tell what is lost, what runs serves on: KeyError: 'pid'",
        "can't tell what is lost, what runs serves on: ValueError: odd",
    ]
