"""The HTTP and the gRPC ingress, and the Batch API."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator

from hycluster.errors import shown
from hycluster.settings.base import Port, Strict, home, is_loopback

URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/|s3:", re.IGNORECASE)
BUCKET = re.compile(r"s3://([^/@\s]+@)?[A-Za-z0-9]")


def is_no_typo(store: str | None) -> str | None:
    """What looks like a URI and is none that is known would be a folder's name; raises ValueError."""
    if store and URI.match(store) and not BUCKET.match(store):
        told = re.sub(r"//[^/@]*@", "//...@", store)
        raise ValueError(f"{shown(told)} is not allowed; must be s3://BUCKET, with a path or without, or a folder")
    return store


class Ingress(Strict):
    """The processes that callers connect to: each is an HTTP and a gRPC ingress, with a gateway for each model.

    Attributes:
        replicas: number of ingress processes.
        resources: what each process reserves, by Ray's names of custom resources: only nodes that have them hold one.
            Leave room for a successor, which starts before its predecessor stops. Empty: any node.
        replicas_per_node: most ingress processes on one node, not counting successors that are about to take over; a
            process for which there is no node waits for one. None: with several nodes, as many as an even spread over
            the nodes that are there at the start takes; with one node, no bound.
    """

    replicas: int = Field(default=1, ge=1, le=64)
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    replicas_per_node: int | None = Field(default=None, ge=1)


class Http(Strict):
    """The HTTP ingress.

    Attributes:
        host: address to listen on; 0.0.0.0 for all of the machine's.
        port: port to listen on; 0 takes a free one.
        control_routes: also serve the routes that change an engine's state (profiling, LoRA loading, ...). With several
            models each such request names its model, by the query parameter ``model`` or in its body.
        allowed_origins: origins that CORS allows.
        max_connections: open connections of one ingress process.
        max_body_mib: largest request body. 32 MiB hold a 256k-token prompt, as text or as ids, with room to spare.
        max_bodies_mib: bodies of all requests that one ingress process has in work, together.
        stalled_client_timeout_s: how long a client may stall: send nothing more of a request that it has begun, or read
            nothing of its answer. Then its connection is closed and its request aborted; likewise when its machine has
            disappeared.
        keep_alive_timeout_s: how long a connection on which nothing is asked any more is kept open. Longer than clients
            and load balancers keep theirs, or one may be closed just when they use it again.
        ui: serve the page at ``/ui``, and what it shows as JSON: the state at ``/hycluster/status``, timelines of
            requests at ``/hycluster/requests``; to whoever reaches the HTTP ingress. None: only where ``host`` is a
            loopback address.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    ui: bool | None = None
    control_routes: bool = False
    allowed_origins: tuple[str, ...] = ()
    max_connections: int = Field(default=4096, ge=1)
    max_body_mib: int = Field(default=32, ge=1, le=1024)
    max_bodies_mib: int = Field(default=512, ge=1)
    stalled_client_timeout_s: float = Field(default=60, gt=0)
    keep_alive_timeout_s: float = Field(default=75, gt=0)

    @property
    def serves_ui(self) -> bool:
        """Whether there is a page."""
        return is_loopback(self.host) if self.ui is None else self.ui


class Grpc(Strict):
    """The gRPC ingress.

    Attributes:
        host: address to listen on; 0.0.0.0 for all of the machine's.
        port: port to listen on; 0 takes a free one.
        max_message_mib: largest message. 32 MiB hold a 256k-token prompt, as text or as ids, with room to spare.
        max_connections: open connections of one ingress process; at most a quarter of its file descriptors.
        max_calls: calls of one ingress process at a time, all methods together.
        max_calls_per_connection: calls of one connection at a time; further ones wait (HTTP/2's concurrent streams).
        stalled_client_timeout_s: how long a client may leave the next chunk of its stream unread, or a call that it has
            begun without its request. Then it is aborted; likewise when its machine has disappeared.
    """

    host: str = "127.0.0.1"
    port: Port = 9000
    max_message_mib: int = Field(default=32, ge=1, le=1024)
    max_connections: int = Field(default=4096, ge=1)
    max_calls: int = Field(default=4096, ge=1)
    max_calls_per_connection: int = Field(default=1024, ge=1)
    stalled_client_timeout_s: float = Field(default=60, gt=0)


class Responses(Strict):
    """Responses that can be asked for again, continued (``previous_response_id``) and answered in the background, at
    every ingress process. They lie in ``batches.store``. With ``auth.enabled`` they are their project's; else all can
    read them who can reach an ingress process and know their ids.

    Attributes:
        keep_days: age at which they are deleted.
        max_stored: most that are kept; the oldest go first. Ingress processes look after every 1/16 of it that they
            have stored.
        max_stored_gib: most that they take together, likewise.
        max_background: most that one ingress process answers in the background at a time; others are shed with 429.
        lease_s: how long an ingress process may show no sign of life before another one answers in its place what it
            had in the background.
        poll_s: interval at which the store is searched for those that have lost their ingress process or were
            cancelled or deleted at another one: so long an engine goes on with such a one. Where it is cancelled at the
            process that has it, the engine drops it at once.
    """

    keep_days: float = Field(default=30, gt=0, le=36500)
    max_stored: int = Field(default=100_000, ge=1, le=100_000_000)
    max_stored_gib: float = Field(default=8, gt=0)
    max_background: int = Field(default=256, ge=1, le=100_000)
    lease_s: float = Field(default=15, gt=0, le=3600)
    poll_s: float = Field(default=1, gt=0, le=60)


class Batches(Strict):
    """OpenAI's Batch API at the HTTP ingress; see ``hycluster/batch_api``.

    Attributes:
        store: folder or ``s3://`` URI for files, batches and stored responses, the same for all nodes; None is
            ``batches`` in ``HYCLUSTER_HOME``, which is enough for one machine.
        max_file_mib: largest upload.
        max_lines: most requests of a batch. Checking that their ids differ takes about 100 bytes of memory each.
        lines_in_flight: most requests in the engines at a time, of all batches together. None: as many as they can use
            of what online requests leave, or 256 for each model where they don't say.
        shard_lines: requests of a shard, which is committed as one, and run again as one if the process dies.
        concurrent_batches: batches that run side by side; the others wait.
        poll_s: interval at which the store is searched for new and for cancelled batches.
        keep_days: age at which files without an ``expires_after`` of their own are deleted; None keeps them.
        resources: what the process that runs batches reserves, by Ray's names of custom resources: only nodes that have
            them hold it. Empty: any node. It reserves no CPU.
    """

    store: str | None = Field(default=None, min_length=1)
    max_file_mib: int = Field(default=512, ge=1, le=1 << 20)
    max_lines: int = Field(default=200_000, ge=1, le=50_000_000)
    lines_in_flight: int | None = Field(default=None, ge=1, le=100_000)
    shard_lines: int = Field(default=64, ge=1, le=100_000)
    concurrent_batches: int = Field(default=8, ge=1, le=1000)
    poll_s: float = Field(default=1.0, gt=0, le=60)
    keep_days: float | None = Field(default=None, gt=0)
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)

    _store_is_no_typo = field_validator("store")(is_no_typo)

    @property
    def place(self) -> str:
        """The folder or URI that the store is."""
        return (self.store or str(home() / "batches")).rstrip("/")
