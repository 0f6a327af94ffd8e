"""Workers that are forked are what workers are otherwise."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

from tests.ray_forks import RAY_FORKS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("some_ray")]


def worker(**variables: str) -> Any:
    """An actor in a process of its own, with these variables."""
    import ray

    class Worker:
        def began_with(self) -> str:
            import sys

            return " ".join(sys.orig_argv)

        def itself(self) -> dict[str, Any]:
            import os
            import signal
            import sys

            return {
                "pid": os.getpid(), "parent": os.getppid(), "group": os.getpgrp(), "argv": sys.argv[0],
                "environment": dict(os.environ), "path": sys.path[-3:], "folder": os.getcwd(), "nice": os.nice(0),
                "child": signal.getsignal(signal.SIGCHLD), "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
            }  # fmt: skip

    return ray.remote(Worker).options(num_cpus=0, runtime_env={"env_vars": variables}).remote()


def forked(actor: Any) -> bool:
    import ray

    return "ray_forks.py" in ray.get(actor.began_with.remote())


def test_a_fork_is_as_a_worker_that_has_imported_for_itself() -> None:
    import ray

    fork, other = worker(HYCLUSTER_LOG_LEVEL="INFO"), worker(HYCLUSTER_LOG_LEVEL="INFO", RAY_read_at_import="1")
    assert forked(fork)
    assert not forked(other)
    of_fork, of_other = ray.get([fork.itself.remote(), other.itself.remote()])
    assert of_fork["environment"] == {
        name: value for name, value in of_other["environment"].items() if name != "RAY_read_at_import"
    }
    assert psutil.Process(of_fork["parent"]).name() == "raylet"
    for own in (of_fork, of_other):
        assert own.pop("pid") == own.pop("group")
        own.pop("environment")
    assert of_fork == of_other


def test_a_fork_that_is_killed_is_gone() -> None:
    import ray

    fork = worker(HYCLUSTER_LOG_LEVEL="INFO")
    assert forked(fork)
    process = psutil.Process(ray.get(fork.itself.remote())["pid"])
    assert "Worker" in " ".join(process.cmdline())
    process.kill()
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(fork.itself.remote())
    assert psutil.wait_procs([process], 10)[1] == []


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "LD_PRELOAD"])
def test_what_a_library_reads_when_it_is_loaded_is_not_forked(variable: str) -> None:
    assert not forked(worker(**{variable: "2" if variable == "OMP_NUM_THREADS" else "libutil.so.1"}))


def test_the_hook_is_rays() -> None:
    """Ray 2.60.0."""
    from ray._private import ray_constants

    assert RAY_FORKS[0] == ray_constants.RAY_RUNTIME_ENV_HOOK
