from __future__ import annotations

import subprocess
import sys

import pytest

BAR = """
import multiprocessing; multiprocessing.set_start_method("spawn")
from multiprocessing import synchronize
made = []; new = synchronize.SemLock.__init__
synchronize.SemLock.__init__ = lambda self, *a, **k: (made.append(self), new(self, *a, **k))[1]
{patch}
from tqdm import tqdm; list(tqdm(range(2), disable=True))
print(len(made))
"""
PATCH = "from hycluster.engine.patches.progress_bar import patch_progress_bars; patch_progress_bars()"


def semaphores(patch: str) -> int:
    """How many a process makes for its first bar."""
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BAR.format(patch=patch)],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return int(said.stdout)


def test_a_bar_of_its_own_still_makes_one() -> None:
    assert semaphores("") == 1


@pytest.mark.slow
def test_patched_it_makes_none() -> None:
    assert semaphores(PATCH) == 0
