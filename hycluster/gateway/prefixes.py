"""What of a request's prompt each replica has in its KV cache, as far as this gateway knows, and how true that was.

Known is what replicas say (:mod:`hycluster.gateway.held_blocks`), and what this gateway has sent them: a request that
waits behind another one with the same beginning finds its blocks, though nobody has said so yet.

What is predicted when a request is sent is compared with what its engine found. They differ where

- other gateways' requests, or this one's with blocks that it could not know (outputs), stored blocks meanwhile: more
  is found than was predicted;
- blocks were evicted for others meanwhile, a request that was counted on was left or passed over, or the cache was
  reset: less is found.

An engine that preempts a request looks up again and does not say what it found then; nor does it for a request that
comes with output from a lost replica. These are not compared again, or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.metrics.stats import PrefillStats

from hycluster.engine.block_changes import decode_changes
from hycluster.engine.protocol import BlockNaming, Frame
from hycluster.gateway.block_names import BlockNamer, reads_cache
from hycluster.gateway.held_blocks import HeldBlocks
from hycluster.observe.prefixes import PrefixAudit


@dataclass(slots=True)
class Prefix:
    """A request's beginning, by blocks.

    Attributes:
        names: of its full blocks.
        readable: how many of them its engine may find: the last token is always computed.
        predicted_tokens: that the replica which has it was to find cached; None: nothing was predicted.
        awaited: names that it is going to store there.
    """

    names: Sequence[int]
    naming: BlockNaming
    readable: int
    predicted_tokens: int | None = None
    replica_id: str = ""
    awaited: Sequence[int] = ()

    def tokens(self, blocks: int) -> int:
        """Of a prompt whose first blocks are there, what need not be computed."""
        return max(0, min(blocks, self.readable) - self.naming.computed_again) * self.naming.tokens


@dataclass
class Prefixes:
    """Of one pool's gateway.

    Attributes:
        audit: predictions beside what was found.
    """

    audit: PrefixAudit = field(default_factory=PrefixAudit)

    def __post_init__(self) -> None:
        self._index = HeldBlocks()
        self._namer = BlockNamer()
        # By replica that has said what it holds: how it names blocks, and what it is going to store.
        self._naming: dict[str, BlockNaming] = {}
        self._awaited: dict[str, Counter[int]] = {}

    @property
    def blocks(self) -> int:
        """Known of, on all replicas."""
        return self._index.blocks

    # -- what replicas say ----------------------------------------------------------------------------

    def hear(self, replica_id: str, naming: BlockNaming, frame: Frame) -> None:
        """A replica said what became of its blocks."""
        self._index.take(replica_id, decode_changes(frame))
        self._naming[replica_id] = naming
        self._awaited.setdefault(replica_id, Counter())

    def forget(self, replica_id: str) -> None:
        """A replica is gone."""
        self._index.forget(replica_id)
        self._naming.pop(replica_id, None)
        self._awaited.pop(replica_id, None)

    # -- requests -------------------------------------------------------------------------------------

    def of(self, request: EngineCoreRequest, output: Sequence[int] = ()) -> Prefix | None:
        """The request's beginning, as the replicas name it; None where none has said what it holds.

        Args:
            output: tokens that it has got so far.
        """
        naming = next(iter(self._naming.values()), None)
        if naming is None:
            return None
        names = self._namer.names(request, naming, output)
        tokens = len(request.prompt_token_ids or ()) + len(output)
        readable = (tokens - 1) // naming.tokens if names and reads_cache(request) else 0
        return Prefix(names, naming, readable)

    def cached_tokens(self, prefix: Prefix, replica_ids: Iterable[str]) -> Mapping[str, int | None]:
        """By replica, what it need not compute of the prompt; None: not known."""
        matched = self._index.matched(prefix.names[: prefix.readable])
        return {
            replica_id: prefix.tokens(self._with_awaited(replica_id, prefix, matched.get(replica_id, 0)))
            if self._naming.get(replica_id) == prefix.naming
            else None
            for replica_id in replica_ids
        }

    def send(self, prefix: Prefix, replica_id: str) -> None:
        """The request goes to this replica: what comes behind it counts on its blocks."""
        prefix.predicted_tokens = self.cached_tokens(prefix, (replica_id,))[replica_id]
        if prefix.predicted_tokens is None:
            return
        holds = self._index.holds
        prefix.replica_id = replica_id
        prefix.awaited = [name for name in prefix.names if not holds(replica_id, name)]
        self._awaited[replica_id].update(prefix.awaited)

    def begun(self, prefix: Prefix, found: PrefillStats | None) -> None:
        """The first output has come: all of the prompt is computed.

        Args:
            found: what of it its engine found; None: it does not say.
        """
        if prefix.predicted_tokens is not None and found is not None:
            self.audit.note(prefix.predicted_tokens, found.num_local_cached_tokens)
        self.let_go(prefix)

    def let_go(self, prefix: Prefix) -> None:
        """Nothing more is to be expected of it: it has stored its blocks, or is there no longer."""
        if prefix.awaited and (awaited := self._awaited.get(prefix.replica_id)) is not None:
            for name in prefix.awaited:
                if awaited[name] > 1:
                    awaited[name] -= 1
                else:
                    del awaited[name]
        prefix.awaited, prefix.predicted_tokens = (), None

    def _with_awaited(self, replica_id: str, prefix: Prefix, blocks: int) -> int:
        """So many of its blocks the replica holds, or is going to when it gets to it."""
        awaited, holds = self._awaited[replica_id], self._index.holds
        while awaited and blocks < prefix.readable:
            name = prefix.names[blocks]
            if name not in awaited and not holds(replica_id, name):
                break
            blocks += 1
        return blocks
