from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]

# As vLLM does when an engine starts.
LOOKS = """
import numba
numba.njit(lambda: 0)()
from vllm.triton_utils import dispatcher
dispatcher._rebind_kernels([(object(), None)])
"""
PATCH = "from hycluster.engine.patches.cpu_kernels import patch_kernel_search as p; p(); p()"


def looks(patched: bool) -> subprocess.CompletedProcess[str]:
    code = f"{PATCH if patched else ''}\n{LOOKS}"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)


def test_vllm_still_takes_what_a_library_says_for_attributes() -> None:
    assert "'_lib_fn_wrapper' object has no attribute 'get'" in looks(patched=False).stderr


def test_patched_it_passes_over_it() -> None:
    ran = looks(patched=True)
    assert ran.returncode == 0, ran.stderr
