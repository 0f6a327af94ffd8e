"""A small Ray cluster in a process of its own, joined by this one.

``ray.init`` forks. A process that has had gRPC's threads, and torch's, may hang in the child before Ray's process is
there, so that its start times out.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Ends with its standard input.
_CLUSTER = """
import sys
from hycluster import cluster
cluster.start()
print("started", flush=True)
sys.stdin.read()
"""


@contextmanager
def ray_apart(home: Path) -> Iterator[None]:
    """Start it and join it; ``home`` is where it is remembered."""
    import ray

    from hycluster import cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYCLUSTER_HOME", str(home))
        patch.delenv("RAY_ADDRESS", raising=False)
        with subprocess.Popen(
            [sys.executable, "-c", _CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            cluster.join_cluster()
            try:
                yield
            finally:
                ray.shutdown()
