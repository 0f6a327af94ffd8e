"""An engine on CPU in a process that has imported Numba.

What: where vLLM looks through all modules for a kernel, it passes over objects that have something else than attributes
under ``__dict__``.
Why: to put kernels for CPUs in the place of Triton's, vLLM asks everything in every module for ``vars(...)["kernel"]``.
``llvmlite``, on which Numba is built, has an object that takes any name for a function of its library, also
``__dict__``; asked so it raises, and the engine does not start. A gateway that names KV blocks has Numba
(``gateway/sha256_blocks.py``), and tests have one beside an engine.
Upstream: none filed; the look through modules is of vllm-project/vllm#43048.
Version: vLLM 0.32.0. Applied by the plugin once that module of vLLM's is there. Watched by
``tests/engine/patches/test_cpu_kernels.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

from collections.abc import Mapping
from typing import Any

from vllm.triton_utils import dispatcher


def patch_kernel_search() -> None:
    """Put it into vLLM, in this process; more than once does nothing."""
    # A module's own name goes before Python's.
    vars(dispatcher)["vars"] = _attributes


def _attributes(value: object) -> Mapping[str, Any]:
    found: object = vars(value)
    return found if isinstance(found, Mapping) else {}
