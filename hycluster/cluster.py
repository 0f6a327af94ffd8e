"""The Ray cluster that a command acts on: join it, or start one on this machine.

Pinned to Ray 2.60.0: ``enable_token_auth_by_default`` and ``ensure_token_if_auth_enabled`` are Ray's
own and private.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)

from hycluster.aside import set_aside
from hycluster.directory.directory import NAMESPACE
from hycluster.errors import SettingsError, one_line
from hycluster.memory import MONITOR_VARIABLE, MemoryGuard
from hycluster.serving.running import Chosen, choose, remember, started_here
from hycluster.settings.base import keep_private, private_home

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
# Of whoever listens at the address of a cluster.
ANSWER_S = 5.0
_TIMED_OUT = "timed out during startup"


def join_cluster(address: str | None = None) -> Chosen:
    """Join the Ray cluster at ``address``, in ``RAY_ADDRESS``, or the one that ``hycluster serve`` started here.

    Never whatever Ray finds on this machine. One that this process has joined already stays.

    Raises:
        SettingsError: there is none, there are several, or it does not answer.
    """
    if ray.is_initialized():
        return Chosen(ray.get_runtime_context().gcs_address, "this process", None)
    chosen = choose(address)
    _quiet()
    if chosen.started:
        # As ``ray.init`` does by itself for a cluster that it starts, but not for one that is named.
        enable_token_auth_by_default()
    # Ray's C++ prints an error line for each of Ray Data's actors that is none.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        _check_reachable(chosen.address)
        ray.init(address=chosen.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingsError(f"{chosen.said_by}: no Ray cluster at {chosen.address!r}: {one_line(error)}") from None
    return chosen


def _check_reachable(address: str) -> None:
    """Ray itself tries an address at which nobody listens for minutes.

    Raises:
        OSError: nobody does.
        ValueError: it is no such address; a job is a driver, which Ray Client's (``ray://``) are not.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()) or "/" in host:
        raise ValueError("must be HOST:PORT, that of its GCS (often HOST:6379), without ray://")
    socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    # Ray's own TLS needs Ray's own certificates.
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        _check_kind(address)


def _check_kind(address: str) -> None:
    """An ingress's address is easily taken for that of the cluster, which stands beside it in the ready line; Ray would
    try to talk to it for minutes, too.

    Raises:
        ValueError: it is an ingress, or nothing that speaks gRPC, as a GCS does.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from hycluster.client import SERVICE

    with grpc.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        try:
            health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=ANSWER_S)
        except grpc.RpcError as error:
            # A GCS has no such service, or doesn't say.
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                return
            raise ValueError(
                "what listens there is no GCS (an ingress?); the ready line of 'hycluster serve' says the address,"
                " behind 'ray'"
            ) from None
    raise ValueError(
        "a gRPC ingress of hycluster; the ready line of 'hycluster serve' says Ray's address, behind 'ray'"
    )


def _quiet() -> None:
    """Ray's own notices are for Ray's developers; its log files keep them all."""
    set_aside()
    for name in ("ray", "ray.serve", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)
        # Serve sets its level anew when it is imported, which may be later.
        logging.getLogger(name).addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def start(*, remembered: bool = True) -> bool:
    """Join the cluster in ``RAY_ADDRESS``, or start one on this machine.

    Args:
        remembered: other commands of this home find the one that was started.

    Returns:
        Whether one was started; it ends with this process. Ray listens on the machine's own address whatever
        one asks for; a token that it keeps in the user's home keeps others out.
    """
    if os.environ.get("RAY_ADDRESS"):
        join_cluster()
        return False
    _quiet()
    private_home()
    _private_token()
    # Ray gives its workers a nice value of 15; engines and ingress processes are what this machine is for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray's monitor kills the directory and Serve's controller for what others have; a guard of ours is in its place.
    os.environ.setdefault(MONITOR_VARIABLE, "0")
    _start_node()
    for process in psutil.Process().children():
        if process.name() == "raylet":
            MemoryGuard(process, tell=logger.warning).start()
    if remembered:
        remember(ray.get_runtime_context().gcs_address)
    return True


def _private_token() -> None:
    """Ray makes the token that keeps others out if there is none, and would let everybody on this machine read it."""
    before = os.umask(0o077)
    try:
        # As ``ray.init`` does a moment later.
        enable_token_auth_by_default()
        ensure_token_if_auth_enabled()
    finally:
        os.umask(before)
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file():
        keep_private(token)


def _start_node() -> None:
    """Ray gives its own processes 30 s to start, whatever one asks for; on a busy machine that may not do."""
    others = psutil.Process().children(recursive=True)
    for left in reversed(range(START_ATTEMPTS)):
        try:
            ray.init(
                address="local",
                namespace=NAMESPACE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # Ray has no class of its own for it.
            if not left or _TIMED_OUT not in str(error):
                raise
            logger.warning("Ray's processes did not start within 30 s; once more")
            ray.shutdown()
            for process in psutil.Process().children(recursive=True):
                if process not in others:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()


def join_or_start(address: str | None = None) -> Chosen | None:
    """Join the Ray cluster that is named or that this home has started, or start one that ends with this process: None.

    Raises:
        SettingsError: as :func:`join_cluster`.
    """
    if ray.is_initialized() or address or os.environ.get("RAY_ADDRESS") or started_here():
        return join_cluster(address)
    # Another job that found it would end with this one.
    start(remembered=False)
    return None
