from __future__ import annotations

import logging

import prometheus_client
import pytest
import stamina

from hycluster.errors import Overloaded, Unavailable
from hycluster.retries import RetryingCaller, as_told


@pytest.mark.parametrize("told_s", [0.05, 1.0, 30.0])
def test_a_wait_that_is_named_is_kept_and_drawn_out_a_little(told_s: float) -> None:
    waits = [as_told(Overloaded("later", retry_after_s=told_s)) for _ in range(50)]
    assert all(told_s <= wait <= told_s + min(told_s, 1.0) for wait in waits)
    # Callers who heard the same at the same moment do not come back at the same.
    assert len(set(waits)) > 40


@pytest.mark.parametrize("error", [Overloaded("later"), Unavailable("down", retry_after_s=0), ConnectionError()])
def test_where_none_is_named_the_backoff_tells(error: Exception) -> None:
    assert as_told(error) is True


def test_nothing_is_logged_or_counted_beside_what_we_count(caplog: pytest.LogCaptureFixture) -> None:
    errors = [OSError("busy")]

    def stumbles() -> str:
        if errors:
            raise errors.pop()
        return "fine"

    with stamina.set_testing(True, attempts=2), caplog.at_level(logging.DEBUG):
        assert RetryingCaller()(OSError, stumbles) == "fine"
    assert not [record for record in caplog.records if "stamina" in record.name]
    assert "stamina" not in prometheus_client.generate_latest().decode()
