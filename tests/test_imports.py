from __future__ import annotations

import gc

import pytest

from hycluster.imports import without_collector


def test_the_collector_rests_and_is_there_again_whatever_happens() -> None:
    def fail() -> None:
        with without_collector():
            assert not gc.isenabled()
            raise ImportError("it is not there")

    with pytest.raises(ImportError):
        fail()
    assert gc.isenabled()


def test_who_has_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with without_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
