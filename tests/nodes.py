"""Nodes with an address, processes and a disk of their own on one machine: what a pod sees, and can be taken from it.

A node is a network, process and mount namespace. Its end kills all that it has at once, as a container's does; it can
also be cut off without a word: its packets are dropped, no connection is closed. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PREFIX = "hyr"
NETWORKS = 200
# An ordinary user as in the image, to whom root's files belong; the kernel gives it no right over anything outside.
_AS_USER = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
_WITHOUT_RIGHTS = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]


@functools.cache
def _unprivileged() -> list[str]:
    """The beginning of a command that is to have no right."""
    as_user = [*_AS_USER, *_WITHOUT_RIGHTS]
    return _WITHOUT_RIGHTS if _try(*as_user, "true").returncode else as_user


def missing() -> str | None:
    """Why there can be no nodes here; None if there can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    for tool in ("ip", "bridge", "unshare", "nsenter", "setpriv"):
        if shutil.which(tool) is None:
            return f"needs {tool} (Debian's iproute2 and util-linux)"
    probe = f"{PREFIX}-probe-{os.getpid()}"
    if _try("ip", "netns", "add", probe).returncode:
        return "the kernel allows no network namespaces here"
    bridged = _try("ip", "link", "add", f"{PREFIX}p{os.getpid() % 10**6}", "type", "bridge")
    _try("ip", "link", "del", f"{PREFIX}p{os.getpid() % 10**6}")
    _try("ip", "netns", "del", probe)
    return "the kernel has no bridges here" if bridged.returncode else None


def _try(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def _run(*command: str) -> str:
    done = _try(*command)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()}")
    return done.stdout


@dataclass
class Node:
    """One of them.

    Attributes:
        folder: its disk, kept when it ends: ``ray`` is its /tmp/ray, ``home`` its home and temporary folder, which it
            has where all nodes have theirs.
    """

    network: Network
    name: str
    address: str
    link: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    _started: tuple[str, dict[str, str]] = ("", {})

    @property
    def namespace(self) -> str:
        return f"{self.network.name}-{self.name}"

    @property
    def log(self) -> Path:
        return self.folder / "out.log"

    def start(self, command: str, env: Mapping[str, str]) -> None:
        """Run a line of bash as the node's first process, as KubeRay does; its end is the node's."""
        self._started = command, dict(env)
        folder = shlex.quote(str(self.folder))
        inside = [
            "set -e",
            f"mount --bind {folder}/ray /tmp/ray",
            f"mount --bind {folder}/resolv.conf /etc/resolv.conf",
            f"mount --bind {folder}/home {shlex.quote(str(self.network.home))}",
            "mount -t tmpfs -o size=1g,mode=1777 shm /dev/shm",
            # Its own folder stays writable where all else, as in the manifests, is not.
            f"mount --bind {folder} {folder}",
            "mount -o remount,bind,ro /",
            f"exec {shlex.join([*_unprivileged(), 'bash', '-c', command])}",
        ]
        with self.log.open("ab") as log:
            # Whatever ends this process ends the node: nothing may be left running.
            self.process = subprocess.Popen(
                # On a busy machine Ray must get on; its workers are as nice as RAY_worker_niceness says.
                ["setpriv", "--pdeathsig", "KILL", "nice", "-n", "-10", "nsenter", f"--net=/run/netns/{self.namespace}",
                 "unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc",
                 "bash", "-c", "\n".join(inside)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**self.network.environment, **env},
                cwd=self.folder / "home",
                start_new_session=True,
            )  # fmt: skip
        # Where the kernel shares time between sessions, niceness counts within them only.
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.process.pid}/autogroup").write_text("-10")

    def start_again(self) -> None:
        """The same, with the disk that it had."""
        self.kill()
        self.start(*self._started)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def pids(self) -> list[int]:
        return [int(pid) for pid in _try("ip", "netns", "pids", self.namespace).stdout.split()]

    def processes(self, word: str) -> dict[int, str]:
        """By pid, the titles of its processes that have the word."""
        found = {}
        for pid in self.pids():
            with contextlib.suppress(psutil.Error):  # it has ended since
                title = " ".join(psutil.Process(pid).cmdline())
                if word in title:
                    found[pid] = title
        return found

    def kill(self) -> None:
        """All processes end at once, by SIGKILL; their connections are closed by the kernel."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            wait_for(lambda: not self.pids(), 30, f"{self.name} has ended")

    def cut(self) -> None:
        """From now on no packet arrives or leaves, and nobody is told.

        Neighbours go on knowing the way, as they do to a node behind a router: without, they would soon hear that it
        cannot be reached.
        """
        here = json.loads(_run("ip", "-j", "-n", self.namespace, "link", "show", "eth0"))[0]["address"]
        others = [node for node in self.network.nodes.values() if node is not self]
        for command in (["ip"], *(["ip", "-n", node.namespace] for node in others)):
            device = "eth0" if len(command) > 1 else self.network.name
            _run(*command, "neigh", "replace", self.address, "lladdr", here, "nud", "permanent", "dev", device)
        _run("bridge", "link", "set", "dev", self.link, "state", "0")

    def remove(self) -> None:
        """Kill it and take its address away."""
        self.kill()
        _end(self.namespace)
        _try("ip", "link", "del", self.link)
        self.network.nodes.pop(self.name, None)


@dataclass
class Network:
    """A bridge of its own, and the nodes on it.

    Attributes:
        hosts: names and addresses, as all nodes are told them from now on: a Service's name moves with its pod.
        closing: what ends with it.
    """

    name: str
    number: int
    folder: Path
    nodes: dict[str, Node] = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _added: int = 10

    @property
    def gateway(self) -> str:
        """This machine's own address on it."""
        return f"10.213.{self.number}.1"

    @property
    def home(self) -> Path:
        """Where a node sees its home."""
        return self.folder / "home"

    @property
    def environment(self) -> dict[str, str]:
        """What each node has at least."""
        home = str(self.home)
        return {"HOME": home, "TMPDIR": home, "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}

    def add(self, name: str) -> Node:
        """A node with an address that none had before."""
        self._added += 1
        node = Node(
            self, name, f"10.213.{self.number}.{self._added}", f"{self.name}v{self._added}",
            self.folder / f"{name}-{self._added}",
        )  # fmt: skip
        for part in (node.folder, node.folder / "ray", node.folder / "home"):
            part.mkdir()
        _run("ip", "netns", "add", node.namespace)
        self.nodes[name] = node
        _run("ip", "link", "add", node.link, "type", "veth", "peer", "name", "eth0", "netns", node.namespace)
        _run("ip", "link", "set", node.link, "master", self.name, "up")
        within = ("ip", "-n", node.namespace)
        _run(*within, "link", "set", "lo", "up")
        _run(*within, "addr", "add", f"{node.address}/24", "dev", "eth0")
        _run(*within, "link", "set", "eth0", "up")
        # Ray asks the routing table for its own address. Nobody is at that one: nothing leaves the bridge.
        _run(*within, "route", "add", "default", "via", f"10.213.{self.number}.254")
        (node.folder / "resolv.conf").write_text(f"nameserver {self.gateway}\n")
        return node

    def tails(self, lines: int = 25) -> str:
        """The ends of what may tell why something failed."""
        told = []
        for pattern in ("*/out.log", "*/ray/session_latest/logs/gcs_server.out", "*/ray/session_latest/logs/raylet.out",
                        "*/ray/session_latest/logs/serve/*.log"):  # fmt: skip
            for path in sorted(self.folder.glob(pattern)):
                words = path.read_text(errors="replace").splitlines()[-lines:]
                told.append(f"--- {path.relative_to(self.folder)}\n" + "\n".join(line[:300] for line in words))
        return "\n".join(told)

    def close(self) -> None:
        for node in list(self.nodes.values()):
            node.remove()
        self.closing.close()
        _try("ip", "link", "del", self.name)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A network that no other run has; what ended runs left behind is removed first."""
    _sweep()
    made = None
    for number in range(1, NETWORKS):
        name = f"{PREFIX}{number}"
        # The name is the lock: there can be only one link of it.
        if _try("ip", "link", "add", name, "type", "bridge").returncode == 0:
            _clear(name)
            # Not below pytest's folders, which others than root may not enter.
            made = Network(name, number, Path(tempfile.mkdtemp(prefix=f"{name}-")))
            break
    if made is None:
        raise RuntimeError(f"{NETWORKS} networks are in use")
    try:
        made.folder.chmod(0o755)
        made.home.mkdir()
        Path("/tmp/ray").mkdir(exist_ok=True)
        _run("ip", "link", "set", made.name, "alias", _owner(os.getpid()), "up")
        _run("ip", "addr", "add", f"{made.gateway}/24", "dev", made.name)
        with _names(made):
            yield made
    finally:
        made.close()


@contextlib.contextmanager
def _names(of: Network) -> Iterator[None]:
    """Answer the nodes' questions for names: gRPC asks no file. What is unknown does not exist."""

    class Names(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked, reply = self.request
            at, labels = 12, []
            while length := asked[at]:
                labels.append(asked[at + 1 : at + 1 + length].decode())
                at += 1 + length
            question, kind = asked[12 : at + 5], asked[at + 1 : at + 3]
            address = of.hosts.get(".".join(labels).lower())
            answer = b""
            if address and kind == b"\x00\x01":
                # The question's name, an address, good for a second.
                answer = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 1, 4) + socket.inet_aton(address)
            flags = 0x8580 if address else 0x8583
            head = asked[:2] + struct.pack("!HHHHH", flags, 1, bool(answer), 0, 0)
            reply.sendto(head + question + answer, self.client_address)

    with socketserver.ThreadingUDPServer((of.gateway, 53), Names) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def _owner(pid: int) -> str:
    return f"{pid} {psutil.Process(pid).create_time():.0f}"


def _sweep() -> None:
    """Remove networks whose run has ended without doing so, with what runs in their namespaces."""
    for link in Path("/sys/class/net").glob(f"{PREFIX}[0-9]*"):
        owner = (link / "ifalias").read_text().strip() if (link / "bridge").is_dir() else ""
        with contextlib.suppress(psutil.Error):
            if not owner or owner == _owner(int(owner.split()[0])):
                continue
        _clear(link.name)
        _try("ip", "link", "del", link.name)


def _clear(name: str) -> None:
    """What belongs to the network of that name, but for its bridge."""
    for entry in Path("/run/netns").glob(f"{name}-*"):
        _end(entry.name)
    for link in Path("/sys/class/net").glob(f"{name}v*"):
        _try("ip", "link", "del", link.name)
    for folder in Path(tempfile.gettempdir()).glob(f"{name}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _end(namespace: str) -> None:
    for pid in _try("ip", "netns", "pids", namespace).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _try("ip", "netns", "del", namespace)


def wait_for(condition: Callable[[], object], timeout_s: float, what: str, every_s: float = 0.2) -> float:
    """Seconds until the condition holds.

    Raises:
        AssertionError: it does not in time.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(every_s)
    return time.monotonic() - began
