"""A second machine, as sockets see it: a network namespace at the far end of a cable that can be pulled.

Nobody is told when it is: no packet comes or goes any more, and no connection is closed. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest


@dataclass
class Cable:
    """The near end has the address ``here``, the far one ``there``."""

    namespace: str
    here: str
    there: str

    @contextlib.contextmanager
    def process(self, script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A Python process at the far end, with pipes; killed in the end."""
        with subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, sys.executable, "-W", "ignore", "-c", script, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                process.kill()

    def pull(self) -> None:
        """From now on nothing gets through. The near end still knows the way, as to a machine behind a router."""
        _ip("netns", "exec", self.namespace, "iptables", "-I", "INPUT", "-i", "far", "-j", "DROP")
        _ip("netns", "exec", self.namespace, "iptables", "-I", "OUTPUT", "-o", "far", "-j", "DROP")

    def plug_in(self) -> None:
        _ip("netns", "exec", self.namespace, "iptables", "-F")


@contextlib.contextmanager
def cable() -> Iterator[Cable]:
    """One that no other run has; the test is skipped where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for a network namespace")
    for tool in ("ip", "iptables"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (Debian's iproute2 and iptables)")
    name = f"hyc{os.getpid()}"
    net = f"10.214.{os.getpid() % 251}"
    made = Cable(name, f"{net}.1", f"{net}.2")
    if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
        pytest.skip("the kernel allows no network namespaces here")
    try:
        _ip("link", "add", name, "type", "veth", "peer", "name", "far", "netns", name)
        _ip("addr", "add", f"{made.here}/24", "dev", name)
        _ip("link", "set", name, "up")
        for command in (["addr", "add", f"{made.there}/24", "dev", "far"], ["link", "set", "far", "up"],
                        ["link", "set", "lo", "up"]):  # fmt: skip
            _ip("-n", name, *command)
        yield made
    finally:
        # Its processes have ended; the link goes with it.
        _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)
