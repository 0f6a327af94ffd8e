from __future__ import annotations

import time

import numpy as np
import pytest

from hycluster.errors import SettingsError
from hycluster.gateway.prefix_router import PoolColumns, PrefixRequest, StepCost
from hycluster.gateway.router import LOAD_POLICIES, POLICIES
from hycluster.simulate.choice import Choice

REQUEST = PrefixRequest(prompt_tokens=100, output_tokens=10, prefix=1)


def columns(outstanding: list[float]) -> PoolColumns:
    load = np.array(outstanding)
    return PoolColumns(
        replica_ids=[str(each) for each in range(len(load))],
        outstanding_tokens=load,
        requests=load,
        prefill_tokens=load,
        decoding=load,
        kv_tokens=load,
        step=StepCost(0.01, 1e-5, 1e-4, 0.0, 1000),
    )


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_chooses(name: str) -> None:
    choice = Choice(name, 0)
    assert choice.choose(columns([90_000.0, 0.0]), REQUEST) == 1 or name == "prefix_hash"
    choice.note_time(time.perf_counter())
    assert choice.took_s[0] >= 0


def test_which_look_at_prefixes() -> None:
    assert {name for name in POLICIES if not Choice(name, 0).by_prefix} == LOAD_POLICIES.keys()


def test_unknown() -> None:
    with pytest.raises(SettingsError, match="--policy: 'best' is not allowed; must be one of least_outstanding_tokens"):
        Choice("best", 0)
