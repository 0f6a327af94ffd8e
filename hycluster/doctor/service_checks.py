"""Looks at what the service needs from elsewhere: ports, the Ray cluster, the store of the Batch API."""

from __future__ import annotations

import os
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError

from hycluster.doctor.finding import Finding, bad, ok, warn
from hycluster.errors import SettingsError
from hycluster.ingress.ports import check_port
from hycluster.serving.running import Chosen, choose, started_here
from hycluster.settings.base import private_home
from hycluster.settings.ingress import Batches
from hycluster.settings.settings import Settings
from hycluster.storage import locate, masked_line

CONNECT_S = 5.0
STORE_S = 15.0


def ports(settings: Settings) -> list[Finding]:
    """Whether the ingress's ports are free on this machine, if it is to be here."""
    if os.environ.get("RAY_ADDRESS"):
        return [ok("ports", "the ingress processes will be on the nodes of RAY_ADDRESS; not looked at")]
    ours = started_here()
    found = []
    for name, host, port in (
        ("http.port", settings.http.host, settings.http.port),
        ("grpc.port", settings.grpc.host, settings.grpc.port),
    ):
        try:
            check_port(host, port, name)
        except SettingsError as error:
            if ours:
                found.append(ok("ports", f"{name}: {port} on {host} is in use, by the service {ours[0]}, it seems"))
            else:
                todo = f"stop what listens there (ss -ltnp 'sport = :{port}'), or set {name} to another one"
                found.append(bad("ports", error.message, todo))
        else:
            found.append(ok("ports", f"{name}: {port} on {host} is free"))
    return found


def ray_cluster(address: str | None) -> Finding:
    """Whether the Ray cluster that commands act on answers."""
    named = address or os.environ.get("RAY_ADDRESS")
    if not named and not started_here():
        return ok("Ray", "no RAY_ADDRESS, and this HYCLUSTER_HOME has started none: serve starts one of its own")
    try:
        chosen = choose(address)
    except SettingsError as error:
        return bad("Ray", error.message, "give --address HOST:PORT of the head's GCS, 6379 by default")
    return _reached(chosen)


def _reached(chosen: Chosen) -> Finding:
    host, colon, port = chosen.address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return bad("Ray", f"{chosen.said_by}: {chosen.address!r} is no HOST:PORT", "such as 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        return bad(
            "Ray",
            f"{chosen.said_by}: nobody answers at {chosen.address}: {error.strerror or error}",
            "look whether the head runs (ray status there) and whether a firewall or a network policy is between",
        )
    if "://" in chosen.address:
        return bad("Ray", f"{chosen.address}: a Ray Client address", "use the GCS address, HOST:6379, without ray://")
    return ok("Ray", f"{chosen} answers")


def store(settings: Batches | None) -> Finding:
    """Whether the store of files, batches and responses can be listed and written, as ingress processes will do."""
    if settings is None:
        return ok("batches.store", "the Batch API is off")
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(_store, settings).result(timeout=STORE_S)
    except LateError:
        return bad("batches.store", f"does not answer within {STORE_S:.0f} s", "look at the endpoint and the way to it")
    finally:
        # A look that hangs is not waited for.
        pool.shutdown(wait=False, cancel_futures=True)


def _store(settings: Batches) -> Finding:
    name = "batches.store"
    try:
        if settings.store is None:
            private_home()
        folder = locate(settings.place, name).writable()
        probe = f"doctor-{secrets.token_hex(8)}"
        folder.make("")
        folder.create(probe, b"")
        folder.delete([probe])
    except SettingsError as error:
        return bad(name, error.message, "must be a folder or s3://BUCKET/PREFIX")
    except OSError as error:
        return bad(
            name,
            masked_line(error),
            "look at its keys (AWS_ACCESS_KEY_ID, ...), endpoint (AWS_ENDPOINT_URL) and rights: GetObject, PutObject,"
            " DeleteObject, ListBucket; of a folder, who owns it",
        )
    if settings.store is None and os.environ.get("RAY_ADDRESS"):
        return warn(
            name,
            f"{folder.masked}: of this machine alone",
            "with several nodes set batches.store to a folder that all see, or to an s3:// URI",
        )
    return ok(name, f"{folder.masked} can be written")
