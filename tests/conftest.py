from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import psutil
import pytest
from httpx._transports import default as httpx_transports

from bench import tiny_llama
from hycluster.imports import without_collector
from tests.lanes import SHARED, Lanes, check_shared, is_heavy, place, room_of, spent
from tests.object_store import ObjectStore, object_store
from tests.ray_apart import ray_apart
from tests.ray_forks import RAY_FORKS
from tests.vllm_forks import VllmForks

# How long an example takes says something of the machine, which others use too.
hypothesis.settings.register_profile("house", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("house")

# Each client reads all of the machine's certificates, 35 ms of CPU time, and tests ask by plain HTTP, many of them
# again and again while something starts.
vars(httpx_transports)["create_ssl_context"] = functools.cache(httpx.create_ssl_context)

# A shell lets what it starts in the background ignore Ctrl-C, and all that comes of it too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_MACHINE = "depends on the machine"
# On two cores, which both are busy: its processes have limits in which they must start, answer and end.
_BESIDE = "its processes share the machine with another worker's"
# More than so many failures are not the machine's.
_MOST_AGAIN = 8
_BEGAN = pytest.StashKey[tuple[float, float]]()
# Ends the session's clusters that have been started, by the fixture's name.
_ENDS: dict[str, Callable[[], None]] = {}


@pytest.fixture(scope="session")
def vllm_imported() -> None:
    """For tests of modules that import vLLM: its import takes seconds and warns of third parties' sins."""
    with without_collector(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hycluster.gateway.generation
        import hycluster.ingress.http  # noqa: F401


@pytest.fixture(scope="module")
def some_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The session's cluster if it runs, or a small one."""
    import ray

    with contextlib.nullcontext() if ray.is_initialized() else ray_apart(tmp_path_factory.mktemp("ray")):
        yield


@pytest.fixture(scope="session")
def store() -> Iterator[ObjectStore]:
    """An S3 server (moto) with one bucket."""
    with object_store() as running:
        yield running


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: random weights, a byte-level tokenizer of 258 tokens, a context of 2048."""
    return tiny_llama.make(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def ends_early() -> dict[str, Callable[[], None]]:
    """Where a session's cluster leaves by its name what ends it; that is called after the last test that uses it."""
    return _ENDS


@pytest.fixture(scope="session")
def vllm_forks(ends_early: dict[str, Callable[[], None]]) -> VllmForks:
    """Runs scripts that need vLLM, and imports it once for all of them."""
    return VllmForks(ends_early)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BEGAN] = time.monotonic(), _busy_s()
    # Each node of Ray's looks through all processes every five seconds, for a dashboard that no test looks at.
    os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
    # Read when torch is loaded. Engines in this process have one thread, as a replica has; with as many as there are
    # cores, threads of two workers' engines spin while they wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Else each worker of each cluster imports for itself.
    os.environ.setdefault(*RAY_FORKS)
    if getattr(config.option, "testrunuid", "") is None:
        config.option.testrunuid = secrets.token_hex(16)
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        # Commands without an address take the only cluster of their home.
        home = _homes(os.environ["PYTEST_XDIST_TESTRUNUID"]) / worker
        common = Path(os.environ.get("HYCLUSTER_HOME") or "~/.cache/hycluster").expanduser() / "models"
        for folder in (home, common):
            folder.mkdir(parents=True, exist_ok=True)
        # A test that runs pytest as another user has this worker's home already.
        with contextlib.suppress(FileExistsError):
            (home / "models").symlink_to(common)
        os.environ["HYCLUSTER_HOME"] = str(home)


def _homes(run: str) -> Path:
    """Where the workers of a run have their homes."""
    return Path(tempfile.gettempdir()) / f"hyt-{run[:8]}"


def pytest_unconfigure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ and (run := getattr(config.option, "testrunuid", None)):
        shutil.rmtree(_homes(run), ignore_errors=True)


def _busy_s() -> float:
    """CPU seconds that this machine has spent since its start."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Each worker has all tests and what they import, to its end."""
    with without_collector():
        collected = yield
    gc.freeze()
    return collected


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a session's cluster come last, one cluster's after the other's: on a small machine they must
    not meet those that others start.
    """
    check_shared(items)
    for item in items:
        if is_heavy(room_of(item.nodeid)):
            item.add_marker(pytest.mark.cluster)
            # Behind a reason that the test gives itself.
            item.add_marker(pytest.mark.machine(_BESIDE))
    if "PYTEST_XDIST_WORKER" in os.environ:
        for item in items:
            _give_room(item)
    items.sort(key=lambda item: [name in getattr(item, "fixturenames", ()) for name in SHARED])


def _give_room(item: pytest.Item) -> None:
    """Timeouts are for a test that has the machine to itself; beside two others it takes up to twice as long."""
    mark = item.get_closest_marker("timeout")
    timeout_s = float(mark.args[0] if mark else item.config.getini("timeout"))
    item.add_marker(pytest.mark.timeout(2 * timeout_s), append=False)


def pytest_xdist_setupnodes() -> None:
    """Clusters that start at once would each make a token for all of this user's."""
    if Path("~/.ray/auth_token").expanduser().exists():
        return
    command = [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token", "--generate"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lanes:
    return Lanes(config, log)


def pytest_runtest_setup() -> None:
    # Left by a test that joined a cluster in this process; what others start must not inherit it.
    os.environ.pop("RAY_BACKEND_LOG_LEVEL", None)
    # A library of vLLM's app sets both to ERROR (``hycluster/logs.py``), and a later test would see no warning.
    logging.root.setLevel(logging.WARNING)
    for handler in logging.root.handlers:
        handler.setLevel(logging.NOTSET)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with place(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """A session's cluster takes gigabytes; it goes when nobody needs it any more."""
    yield
    for name in list(_ENDS):
        if nextitem is None or name not in getattr(nextitem, "fixturenames", ()):
            _ENDS.pop(name)()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if mark := item.get_closest_marker("machine"):
        report.user_properties.append((_MACHINE, mark.args[0]))
    return report


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    began, busy = config.stash[_BEGAN]
    wall, cpu, cores = time.monotonic() - began, _busy_s() - busy, psutil.cpu_count() or 1
    terminalreporter.write_line(
        f"this machine's {cores} cores spent {cpu:.0f} CPU seconds in {wall:.0f} s ({cpu / wall / cores:.0%})"
    )
    if config.getoption("numprocesses", None):
        done = [report for kind in terminalreporter.stats.values() for report in kind if hasattr(report, "duration")]
        for line in spent(done, time.time() - wall):
            terminalreporter.write_line(line)
    reports = [report for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, ())]
    reasons = {report.nodeid: dict(getattr(report, "user_properties", ())).get(_MACHINE) for report in reports}
    # Where CI wants to read what is worth another run: all that failed, if all of that depends on the machine.
    if (file := os.environ.get("TESTS_AGAIN")) and exitstatus == pytest.ExitCode.TESTS_FAILED:
        again = all(reasons.values()) and len(reasons) <= _MOST_AGAIN
        Path(file).write_text("".join(f"{nodeid}\t{why}\n" for nodeid, why in reasons.items()) if again else "")
