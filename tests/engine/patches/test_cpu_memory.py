from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.sources import set_on_self

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_segments_of_a_group_lose_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hycluster.engine.patches import cpu_memory

    monkeypatch.setattr(cpu_memory, "FOLDER", tmp_path)
    group, other = "ident-tp:0-[0-1]-cpushm", "ident-tp:0-[2-3]-cpushm"
    for name in (f"{group}_0", f"{group}_1", f"{other}_0"):
        (tmp_path / name).touch()
    cpu_memory._drop_names(SimpleNamespace(group_name=group))
    assert [path.name for path in tmp_path.iterdir()] == [f"{other}_0"]


def test_patching_again_changes_nothing() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    from hycluster.engine.patches.cpu_memory import patch_segments

    patch_segments()
    before = _CPUSHMDistributed._init_cpu_shm
    patch_segments()
    assert _CPUSHMDistributed._init_cpu_shm is before


def test_names_go_behind_the_last_barrier() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    assert "group_name" in set_on_self(_CPUSHMDistributed.__init__)
    started = inspect.getsource(_CPUSHMDistributed._init_cpu_shm)
    assert started.index("join_shm_manager") < started.rindex("barrier")
