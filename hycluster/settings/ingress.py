"""The HTTP and the gRPC ingress, and the Batch API."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator

from hycluster.errors import shown
from hycluster.settings.base import Port, Strict

URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/|s3:", re.IGNORECASE)
BUCKET = re.compile(r"s3://([^/@\s]+@)?[A-Za-z0-9]")


class Http(Strict):
    """The HTTP door.

    Attributes:
        port: 0 takes a free one.
        control_routes: open also the routes that change an engine's state (sleep, LoRA loading, ...).
        allowed_origins: origins for CORS.
        max_connections: open connections of one door.
        max_body_mib: most of a request's body. 32 MiB hold a 256k-token prompt as text or as ids with room to spare.
        max_bodies_mib: most of all bodies of the requests that a door has in work.
        stalled_client_timeout_s: how long a client may keep the door waiting: for a request that it has begun to
            send, or for room for an answer that it does not read. Then it is cut off and its request aborted. So is one
            whose machine has gone without a word.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    control_routes: bool = False
    allowed_origins: tuple[str, ...] = ()
    max_connections: int = Field(default=4096, ge=1)
    max_body_mib: int = Field(default=32, ge=1, le=1024)
    max_bodies_mib: int = Field(default=512, ge=1)
    stalled_client_timeout_s: float = Field(default=60, gt=0)


class Grpc(Strict):
    """The gRPC door.

    Attributes:
        max_message_mib: 32 MiB hold a 256k-token prompt as text or as ids with room to spare.
        max_calls: calls of one door at a time, all methods together.
        max_calls_per_connection: the further calls of a client wait until it has fewer.
        stalled_client_timeout_s: how long a caller may leave the next chunk of its stream unread. Then its request
            is aborted. So is that of one whose machine has gone without a word.
    """

    host: str = "127.0.0.1"
    port: Port = 9000
    max_message_mib: int = Field(default=32, ge=1, le=1024)
    max_calls: int = Field(default=4096, ge=1)
    max_calls_per_connection: int = Field(default=1024, ge=1)
    stalled_client_timeout_s: float = Field(default=60, gt=0)


class Batches(Strict):
    """OpenAI's Batch API at the HTTP doors; see ``hycluster/batch_api``.

    Attributes:
        store: folder or ``s3://`` URI for files and batches, the same for all nodes; None is ``batches`` below
            ``HYCLUSTER_HOME``, which does for one machine.
        max_file_mib: most of an uploaded file.
        max_lines: most requests of a batch. Checking that their ids differ takes about 100 bytes of memory each.
        lines_in_flight: most requests in the engines at once, of all batches together.
        shard_lines: requests that are committed as one, and asked again as one if the process dies.
        concurrent_batches: batches that run side by side; the others wait.
        poll_s: seconds between two looks for new batches and for cancelled ones.
        keep_days: age at which files are deleted for which no other was asked for; None keeps them.
        resources: what the process that runs batches reserves, by Ray's names of custom resources: only nodes that have
            them hold it. Empty: it goes anywhere. It takes no CPU.
    """

    store: str | None = Field(default=None, min_length=1)
    max_file_mib: int = Field(default=512, ge=1, le=1 << 20)
    max_lines: int = Field(default=200_000, ge=1, le=50_000_000)
    lines_in_flight: int = Field(default=256, ge=1, le=100_000)
    shard_lines: int = Field(default=64, ge=1, le=100_000)
    concurrent_batches: int = Field(default=8, ge=1, le=1000)
    poll_s: float = Field(default=1.0, gt=0, le=60)
    keep_days: float | None = Field(default=None, gt=0)
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)

    @field_validator("store")
    @classmethod
    def _store_is_no_typo(cls, store: str | None) -> str | None:
        """What looks like a URI and is none that is known would be a folder's name."""
        if store and URI.match(store) and not BUCKET.match(store):
            told = re.sub(r"//[^/@]*@", "//...@", store)
            raise ValueError(f"{shown(told)} is not allowed; must be s3://BUCKET, with a path or without, or a folder")
        return store
