"""What a replica asks of an engine.

The cut is where vLLM itself cuts between its front end and its engine core: an encoded
``EngineCoreRequest`` goes in, and for each engine step and each client one encoded
``EngineCoreOutputs`` comes out, with the new token ids of all of that client's streams.
Clients (gateways) are numbered by the replica; an engine only keeps their outputs apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hycluster.core import ReplicaLoad

Frame = bytes | bytearray | memoryview

# In the place of a client's number: a message for the other ranks of the engine's data-parallel group.
SIBLINGS = -2
# The same for what concerns no client; never one that :meth:`Engine.next_output` gives out.
NOBODY = -1
# In a request's ``extra_args``: the tokens that it got from a replica that is lost; see ``migrated.py``.
MIGRATED = "hycluster_migrated"


@dataclass(frozen=True, slots=True)
class GroupRank:
    """An engine's place in its data-parallel group.

    Attributes:
        rank: from 0; rank 0 started the others.
        size: ranks of the group.
        host, port: torch's ``TCPStore`` of the group, where the ranks find each other.
    """

    rank: int
    size: int
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class BlockNaming:
    """How an engine names the blocks of its prefix cache, and what it makes of those that a request finds there.

    Attributes:
        tokens: of a block.
        algorithm: vLLM's name of the hash.
        root: what the first block of a prompt has in the place of a hash of what is before it.
        computed_again: of the blocks that a request finds, so many are computed all the same (for drafts, 1).
    """

    tokens: int
    algorithm: str
    root: bytes
    computed_again: int = 0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is known of an engine once it has started.

    Attributes:
        max_model_len: longest prompt plus output, in tokens.
        kv_tokens: tokens that the KV cache holds.
        block_size: tokens a KV block.
        supported_tasks: vLLM's names (``generate``, ...).
        blocks: how it names its KV blocks; None: it does not tell which it has.
    """

    max_model_len: int
    kv_tokens: int
    block_size: int
    supported_tasks: tuple[str, ...] = ("generate",)
    blocks: BlockNaming | None = None


class Engine(Protocol):
    """A started engine. Calls return at once; ``next_output`` blocks. Safe to call from several threads."""

    info: EngineInfo

    def add(self, client: int, frames: Sequence[Frame]) -> None:
        """Queue a request: the msgpack frames of one ``EngineCoreRequest``.

        Frames that can't be decoded or a request that can't be prepared are answered with an output
        whose finish reason is ``error``; they never stop the engine.
        """

    def abort(self, client: int, request_ids: list[str]) -> None:
        """Drop requests of this client, free their KV blocks before the next step. Unknown ids are ignored."""

    def abort_client(self, client: int) -> None:
        """Drop all requests of a client that has gone."""

    def call(self, client: int, call_id: int, method: str, args: Sequence[Any]) -> None:
        """Call a control method; its result comes as an output with ``utility_output``."""

    def follow_blocks(self, client: int) -> None:
        """Tell this client which KV blocks there are, and from then on which come and go (``block_changes.py``)."""

    def next_output(self) -> tuple[int, Sequence[Frame]] | None:
        """Block for the next message: the client it is for and the frames of one ``EngineCoreOutputs``.

        Before these come frames of what became of KV blocks, if the client follows them; there may be no others.

        Returns:
            None once the engine has ended, by ``shutdown`` or by a fatal error (see ``error``). The client may be
            SIBLINGS; then the frames are for :meth:`hear` of the other ranks.
        """

    def hear(self, frames: Sequence[Frame]) -> None:
        """A message from another rank of the data-parallel group."""

    def load(self) -> ReplicaLoad:
        """What the engine does now; ``outstanding_tokens`` is left empty."""

    def probe(self) -> None:
        """Have the engine generate one token for nobody; nothing while it is paused or asleep."""

    @property
    def error(self) -> BaseException | None:
        """Why the engine died, None while it lives or after ``shutdown``."""

    @property
    def last_step_age_s(self) -> float | None:
        """Seconds without a finished engine step while there is work, queued or begun; None while idle."""

    def shutdown(self) -> None:
        """End the engine and all its processes; returns when they are gone."""
