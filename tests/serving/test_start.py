"""When a start is over, and when there is nothing more to wait for."""

from __future__ import annotations

from dataclasses import replace

from hycluster.core import StartTrouble
from hycluster.directory.directory import Overview
from hycluster.errors import EngineStartFailed, SettingsError, start_failure
from hycluster.serving.start import end_of_hope, ready_models
from hycluster.settings.model import Model
from hycluster.settings.settings import Settings

SETTINGS = Settings(models=(Model(name="a", source="/a"), Model(name="b", source="/b")), start_timeout_s=100)
NO_MEMORY = StartTrouble(3, "EngineStartFailed", "no memory", 4.0)
NO_FOLDER = StartTrouble(1, "SettingsError", "source: no such folder", 1.0, hopeless=True)


def seen(*ready: str, asleep: str = "", **troubles: StartTrouble) -> Overview:
    return Overview(1, dict.fromkeys(ready, 1), troubles, frozenset(asleep))


def ready(overview: Overview, elapsed_s: float = 10) -> list[str] | None:
    return ready_models(SETTINGS, overview, elapsed_s=elapsed_s)


def test_it_is_over_when_all_serve() -> None:
    assert ready(seen("a", "b")) == ["a", "b"]
    assert ready(seen("a", asleep="b")) == ["a", "b"]


def test_an_ingress_process_that_would_refuse_is_waited_for() -> None:
    assert ready(replace(seen("a", "b"), unreached=frozenset({"b"}))) is None
    assert ready(replace(seen("a", "b"), unreached=frozenset({"b"})), elapsed_s=101) == ["a", "b"]


def test_one_that_may_yet_come_is_waited_for() -> None:
    assert ready(seen("a")) is None
    assert ready(seen("a"), elapsed_s=101) == ["a"]


def test_one_that_failed_is_not_waited_for() -> None:
    assert ready(seen("a", b=NO_MEMORY)) == ["a"]
    # A replica of several did not start; its model serves.
    assert ready(seen("a", "b", b=NO_MEMORY)) == ["a", "b"]


def test_without_any_there_is_nothing_to_be_ready() -> None:
    assert ready(seen(b=NO_MEMORY), elapsed_s=101) is None


def hope(overview: Overview, *reports: str, elapsed_s: float = 10) -> object:
    return end_of_hope(SETTINGS, overview, reports, elapsed_s=elapsed_s)


def test_there_is_hope_while_one_model_may_serve() -> None:
    assert hope(seen()) is None
    assert hope(seen(a=NO_FOLDER)) is None
    assert hope(seen(a=NO_FOLDER, b=NO_MEMORY)) is None


def test_wrong_settings_of_every_model_end_it() -> None:
    error = hope(seen(a=NO_FOLDER, b=NO_FOLDER))
    assert isinstance(error, SettingsError)
    assert error.message == "source: no such folder; source: no such folder"


def test_an_ingress_process_that_can_not_open_ends_it() -> None:
    said = f"A replica failed to start. {start_failure(SettingsError('http.port: 80 is taken'))!s}"
    assert hope(seen(), said) is None  # Ray's report says which error it was
    error = hope(seen(), f"RuntimeError: {start_failure(SettingsError('http.port: 80 is taken'))!s}")
    assert isinstance(error, SettingsError)
    assert error.message == "http.port: 80 is taken"
    # A replica that fails like this is its model's own affair.
    assert hope(seen(a=NO_FOLDER), f"RuntimeError: {start_failure(SettingsError('x'))!s}") is None


def test_no_model_in_time_ends_it_with_the_reasons() -> None:
    error = hope(seen(a=NO_MEMORY), elapsed_s=101)
    assert isinstance(error, EngineStartFailed)
    assert error.message == (
        "start_timeout_s: no model could be served after 100 s: a: 3 starts of replicas failed: no memory"
    )
    error = hope(seen(), "1 replicas that have taken more than 30s to be scheduled", elapsed_s=101)
    assert isinstance(error, EngineStartFailed)
    assert error.message.endswith("30s to be scheduled")
