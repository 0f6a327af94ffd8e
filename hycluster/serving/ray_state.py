"""What Ray and Ray Serve know of a running service: its processes, and why some of them do not start.

Pinned to Ray 2.60.0: all that reaches past its public interfaces to look at, or to stop, what runs is here.
``tests/serving/test_ray_state.py`` compares it with the installed one. One look costs some 3 ms of CPU time, of which
2 are the Serve controller's; ``serve.status()`` costs twenty times that.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import psutil
import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from hycluster.directory.directory import Overview, find_directory

ANSWER_WITHIN_S = 2.0
CONTROLLER, DIRECTORY = "controller", "directory"
# States in which a Serve replica holds a process that has started.
STARTED = frozenset({"RUNNING", "UPDATING", "RECOVERING", "PENDING_MIGRATION"})
# Ray gives up a GCS that it can't reach after so many seconds, with all of its processes, unless it is told otherwise.
GCS_PATIENCE_VARIABLE, GCS_PATIENCE_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0


@dataclass(frozen=True, slots=True)
class ServiceProcess:
    """A process of the service.

    A Serve controller that has just begun knows that there is one, but not yet which: then the last three are empty.

    Attributes:
        deployment: Serve's name of what it is one of.
        actor: Ray's name of it.
    """

    deployment: str
    id: str
    pid: int | None
    node: str
    actor: str


@dataclass(frozen=True, slots=True)
class Deployment:
    """What Serve says of a deployment: how many processes there are to be, what it does, and why."""

    wanted: int
    status: str
    message: str


@dataclass(frozen=True, slots=True)
class Look:
    """One look at everything.

    Attributes:
        controller: tells one process of the Serve controller from the next; None: it does not answer.
        late: which of :data:`CONTROLLER` and :data:`DIRECTORY` were asked and have not answered in time, dead or slow.
        deployments: by name; None while the controller does not know.
        processes: by id, those that have started.
        overview: the directory's; None: it does not answer.
        nodes: by id, the addresses of nodes that live.
    """

    controller: str | None = None
    deployments: Mapping[str, Deployment] | None = None
    processes: Mapping[str, ServiceProcess] = field(default_factory=dict)
    overview: Overview | None = None
    nodes: Mapping[str, str] = field(default_factory=dict)
    late: frozenset[str] = frozenset()


def look(app_name: str, directory: str) -> Look:
    """Ask Serve's controller, the directory and GCS. Takes :data:`ANSWER_WITHIN_S` at most from each of the first two.

    Raises:
        ray.exceptions.RayError: GCS does not answer.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    late: set[str] = set()
    overview = _answer(partial(find_directory, directory), "overview", late, DIRECTORY)
    controller = partial(ray.get_actor, SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    details = _answer(controller, "get_serve_instance_details", late, CONTROLLER)
    found = Look() if details is None else read_details(details, app_name)
    return replace(found, overview=overview, nodes=nodes, late=frozenset(late))


def read_details(details: Mapping[str, Any], app_name: str) -> Look:
    """Serve's part of a look: ``details`` is its ``ServeInstanceDetails`` as a mapping, without what was not set."""
    worker = str(details["controller_info"].get("worker_id"))
    app = details["applications"].get(app_name)
    if app is None:
        return Look(worker)
    deployments = {
        name: Deployment(each["target_num_replicas"] or 0, _word(each["status"]), each["message"])
        for name, each in app["deployments"].items()
    }
    processes = {
        each["replica_id"]: ServiceProcess(
            name,
            each["replica_id"],
            each.get("pid"),
            each.get("node_ip") or "",
            each.get("actor_name") or "",
        )
        for name, deployment in app["deployments"].items()
        for each in deployment["replicas"]
        if _word(each["state"]) in STARTED
    }
    return Look(worker, deployments, processes)


def _answer(find: Callable[[], Any], question: str, late: set[str], name: str) -> Any:
    """None if there is none in time, which is noted, or nobody to ask."""
    try:
        return ray.get(getattr(find(), question).remote(), timeout=ANSWER_WITHIN_S)
    except TimeoutError:
        late.add(name)
    except (ray.exceptions.RayError, ValueError):
        pass
    return None


def _word(value: Any) -> str:
    """Serve gives enumerations or their values."""
    return str(getattr(value, "value", value))


def handle(process: ServiceProcess) -> Any:
    """The actor of a Serve replica.

    Raises:
        ValueError: it has gone.
    """
    return ray.get_actor(process.actor, SERVE_NAMESPACE)


def drain(actors: Sequence[Any], timeout_s: float) -> bool:
    """Stop Serve's replicas as Serve does, but without its controller and without GCS; returns whether all have ended.

    A call to an actor that has been called before goes from process to process.
    """
    asked = [actor.perform_graceful_shutdown.remote() for actor in actors]
    return not asked or len(ray.wait(asked, num_returns=len(asked), timeout=timeout_s, fetch_local=False)[0]) == len(
        asked
    )


def own_process(name: str) -> int | None:
    """Pid of Ray's process of that name (``gcs_server``, ``raylet``) that this process started."""
    return next((child.pid for child in psutil.Process().children() if child.name() == name), None)


def raylet_here() -> int | None:
    """Pid of the raylet that this process has joined, as the other end of its socket tells it."""
    node: Any = ray._private.worker.global_worker.node
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(node.raylet_socket_name)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", credentials)[0])
    return None
