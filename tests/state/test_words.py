from __future__ import annotations

from dataclasses import replace

import pytest

from hycluster.state.words import count, left_of, load_of, percent, progress_of, span
from tests.state.made import NOW, made_batches, made_state


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "-"), (0, "0 ms"), (0.0021, "2.1 ms"), (0.0312, "31 ms"), (0.25, "250 ms"), (0.9999, "1.0 s"),
        (9.99, "10 s"), (119, "119 s"), (150, "2 min"), (3600, "1 h"), (81_000, "22 h 30 min"), (200_000, "2 d 7 h"),
    ],
)  # fmt: skip
def test_spans(seconds: float | None, words: str) -> None:
    assert span(seconds) == words


@pytest.mark.parametrize(
    ("share", "digits", "words"),
    [(None, 0, "-"), (0.994, 0, "99 %"), (0.9999, 0, "99 %"), (0.99999, 2, "99.99 %"), (1, 2, "100.00 %")],
)
def test_what_is_not_all_is_not_told_as_all(share: float | None, digits: int, words: str) -> None:
    assert percent(share, digits) == words


def test_counts() -> None:
    assert [count(number) for number in (0, 1234, 3_240_000, 7.2e9)] == ["0", "1,234", "3.2 M", "7.2 G"]


def test_replicas_and_batches() -> None:
    busy = made_state().pools[0].replicas[0]
    assert load_of(busy) == "63 of 64 running, 3 waiting"
    assert load_of(replace(busy, most_running=0, waiting=0)) == "63 running"
    runs, late, _, done = made_batches()
    assert progress_of(runs) == "31,262 of 48,000 requests, 12 failed"
    assert left_of(runs, NOW) == "22 h 30 min left"
    assert left_of(late, NOW + 3600) == "41 min over its window"
    assert left_of(done, NOW) == "took 45 min"
