"""Scripts that need vLLM, forked from a process that has imported it (``forks.py``).

The import takes ten seconds of CPU time, an engine of a tiny model two. Used by the fixture of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.forks import Forks

# With what an engine imports when it is made.
IMPORTED = (
    "torch._inductor",
    "vllm.entrypoints.llm",
    "vllm.lora.request",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "tests.vllm_worker_forks",
)


def cache_root(folder: Path) -> Path:
    """For vLLM, with nothing compiled in it, but with what this user's vLLM has found out of models' classes.

    That takes another import each time, in a process of its own.
    """
    known = Path("~/.cache/vllm/modelinfos").expanduser()
    known.mkdir(parents=True, exist_ok=True)
    root = folder / "vllm"
    root.mkdir()
    (root / known.name).symlink_to(known)
    return root


class VllmForks:
    """Runs scripts, one after the other.

    Args:
        ends_early: what ends the process that they come from, by its name; see the fixture.
    """

    def __init__(self, ends_early: dict[str, Callable[[], None]]) -> None:
        self._ends_early = ends_early
        self._forks = Forks(IMPORTED)

    def run(
        self,
        script: Path | str,
        *arguments: str,
        asked: str = "",
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """What it printed; see :meth:`Forks.run`.

        Raises:
            AssertionError: it failed; with the end of what it said.
        """
        self._ends_early["vllm_forks"] = self._forks.close
        done = self._forks.run(script, *arguments, asked=asked, timeout_s=timeout_s, environment=environment)
        end = f"{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
        assert done.returncode == 0, f"{script} ended with {done.returncode}: {end}"
        return done.stdout
