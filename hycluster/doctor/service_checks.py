"""Looks at what the service needs from elsewhere: ports, the Ray cluster, stores, the database of keys."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from functools import partial

from hycluster.doctor.finding import Finding, bad, ok, warn
from hycluster.errors import SettingsError, Unavailable
from hycluster.ingress.ports import check_port
from hycluster.serving.running import Chosen, choose, started_here
from hycluster.settings.auth import Auth
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
    return _in_time("batches.store", partial(_written, "batches.store", settings.place, settings.store is None))


def ledger(settings: Settings) -> Finding:
    """The same of the usage ledger's."""
    name = "ledger.store"
    if not settings.keeps_ledger:
        return ok(name, "the usage ledger is off")
    if settings.ledger.store is None and settings.batches is not None:
        return ok(name, "is in batches.store")
    place = settings.ledger_place
    return _in_time(name, partial(_written, name, place, settings.ledger.store is None))


def database(settings: Auth) -> Finding:
    """Whether the database of keys answers, and is of this version."""
    name = "auth.database"
    if not (settings.enabled and settings.keys):
        return ok(name, "no API keys are asked for")
    return _in_time(name, partial(_database, name, settings))


def certificate(settings: Auth) -> Finding:
    """Whether the ingress has a certificate to show, and one that callers will take."""
    name = "auth.tls"
    if settings.tls is None:
        return ok(name, "callers are not spoken to in TLS")
    if os.environ.get("RAY_ADDRESS"):
        return ok(name, "the ingress processes will be on the nodes of RAY_ADDRESS; not looked at")
    # Where there is no TLS, nothing of it is imported.
    from hycluster.ingress.tls import check_files

    try:
        ends_at = check_files(settings.tls).expires_at
    except SettingsError as error:
        return bad(name, error.message, "set it to files that this user can read, of a certificate and its own key")
    ends = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ends_at))
    if ends_at <= time.time():
        return bad(name, f"{settings.tls.certificate} has expired, at {ends}", "put a new one, with its key, there")
    return ok(name, f"{settings.tls.certificate} is good until {ends}")


def _in_time(name: str, look: Callable[[], Finding]) -> Finding:
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(look).result(timeout=STORE_S)
    except LateError:
        return bad(name, f"does not answer within {STORE_S:.0f} s", "look at the endpoint and the way to it")
    finally:
        # A look that hangs is not waited for.
        pool.shutdown(wait=False, cancel_futures=True)


def _written(name: str, place: str, own: bool) -> Finding:
    """``own``: it is in this machine's home, as nothing else is said."""
    try:
        if own:
            private_home()
        folder = locate(place, name).writable()
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
    if own and os.environ.get("RAY_ADDRESS"):
        return warn(
            name,
            f"{folder.masked}: of this machine alone",
            f"with several nodes set {name} to a folder that all see, or to an s3:// URI",
        )
    return ok(name, f"{folder.masked} can be written")


def _database(name: str, settings: Auth) -> Finding:
    # Where there are no keys, nothing of a database is imported.
    from hycluster.auth.database import VARIABLE, database_url, is_up_to_date, open_database

    try:
        engine = open_database(settings)
        try:
            current = is_up_to_date(engine)
        finally:
            engine.dispose()
    except SettingsError as error:
        return bad(name, error.message, f"set auth.database, or {VARIABLE}, to one that this version can use")
    except Unavailable as error:
        return bad(
            name,
            error.message,
            f"look whether it runs, at the way to it, and at who may do what there; where it is, auth.database or"
            f" {VARIABLE} says",
        )
    where = database_url(settings) or "it"
    if where.startswith("sqlite") and os.environ.get("RAY_ADDRESS"):
        return warn(name, f"{where}: of this machine alone", "with several nodes set it to a PostgreSQL that all reach")
    return ok(
        name, f"{where} answers" if current else f"{where} is made, or brought to this version, by the next start"
    )
