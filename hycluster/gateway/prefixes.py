"""What of a request's prompt each replica has in its KV cache, as far as this gateway knows, and how true that was.

Known is what replicas say (:mod:`hycluster.gateway.block_index`), and what this gateway has sent them: a request that
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

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.metrics.stats import PrefillStats

from hycluster.engine.block_changes import Names, decode_changes
from hycluster.engine.protocol import BlockNaming, EngineInfo, Frame
from hycluster.gateway.block_index import BlockIndex
from hycluster.gateway.block_names import BlockNamer, reads_cache
from hycluster.gateway.turnover import Turnover
from hycluster.observe.prefixes import PrefixAudit

# So many tokens of a prompt name its beginning, or so many where it has fewer, or one block.
_BEGIN_TOKENS = (1024, 512, 1)


@dataclass(slots=True)
class Prefix:
    """A request's beginning, by blocks.

    Attributes:
        names: of its full blocks.
        readable: how many of them its engine may find: the last token is always computed.
        held: by replica, how many of these it held when the request came.
        predicted_tokens: that the replica which has it was to find cached; None: nothing was predicted.
        awaited: names that it is going to store there.
    """

    names: Names
    naming: BlockNaming
    readable: int
    held: Mapping[str, int] = field(default_factory=dict)
    predicted_tokens: int | None = None
    replica_id: str = ""
    awaited: Sequence[int] = ()

    def tokens(self, blocks: int) -> int:
        """Of a prompt whose first blocks are there, what need not be computed."""
        return max(0, min(blocks, self.readable) - self.naming.computed_again) * self.naming.tokens

    @property
    def begin(self) -> int | None:
        """Names its first blocks; None if it has no full one."""
        lengths = (max(1, tokens // self.naming.tokens) for tokens in _BEGIN_TOKENS)
        return next((int(self.names[blocks - 1]) for blocks in lengths if blocks <= len(self.names)), None)


@dataclass
class Prefixes:
    """Of one pool's gateway.

    Attributes:
        audit: predictions beside what was found.
        clock: seconds.
    """

    audit: PrefixAudit = field(default_factory=PrefixAudit)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        # Made when the first replica says how large its KV cache is.
        self._index: BlockIndex | None = None
        self._namer = BlockNamer()
        # By replica that has said what it holds: how it names blocks, what it is going to store, and how fast it drops.
        self._naming: dict[str, BlockNaming] = {}
        self._awaited: dict[str, Counter[int]] = {}
        self._turnover: dict[str, Turnover] = {}

    @property
    def blocks(self) -> int:
        """Known of, on all replicas."""
        return self._index.blocks if self._index is not None else 0

    # -- what replicas say ----------------------------------------------------------------------------

    def hear(self, replica_id: str, info: EngineInfo, frame: Frame) -> None:
        """A replica said what became of its blocks."""
        if info.blocks is None:
            return
        changes = decode_changes(frame)
        if self._index is None:
            self._index = BlockIndex(info.kv_tokens // info.blocks.tokens)
        self._index.take(replica_id, changes)
        self._naming[replica_id] = info.blocks
        self._awaited.setdefault(replica_id, Counter())
        if len(changes.dropped):
            self._turnover.setdefault(replica_id, Turnover()).note(len(changes.dropped), self.clock())

    def forget(self, replica_id: str) -> None:
        """A replica is gone."""
        if self._index is not None:
            self._index.forget(replica_id)
        self._naming.pop(replica_id, None)
        self._awaited.pop(replica_id, None)
        self._turnover.pop(replica_id, None)

    def evicts_age_s(self, replica_id: str) -> float:
        """How long what it would drop next has not been used, about; infinite where it drops nothing."""
        turnover = self._turnover.get(replica_id)
        if turnover is None or self._index is None:
            return math.inf
        return turnover.age_s(self._index.held_by(replica_id), self.clock())

    # -- requests -------------------------------------------------------------------------------------

    def of(self, request: EngineCoreRequest, output: Sequence[int] = ()) -> Prefix | None:
        """The request's beginning, as the replicas name it, and what they hold of it; None where none has said that.

        Args:
            output: tokens that it has got so far.
        """
        naming = next(iter(self._naming.values()), None)
        if naming is None or self._index is None:
            return None
        names = self._namer.names(request, naming, output)
        tokens = len(request.prompt_token_ids or ()) + len(output)
        readable = (tokens - 1) // naming.tokens if len(names) and reads_cache(request) else 0
        found = self._index.cached_blocks(names[:readable]).tolist()
        return Prefix(names, naming, readable, dict(zip(self._index.replica_ids, found, strict=True)))

    def cached_tokens(self, prefix: Prefix, replica_ids: Iterable[str]) -> Mapping[str, int | None]:
        """By replica, what it need not compute of a prompt that comes now; None: not known."""
        return {
            replica_id: prefix.tokens(self._with_awaited(replica_id, prefix))
            if self._naming.get(replica_id) == prefix.naming
            else None
            for replica_id in replica_ids
        }

    def send(self, prefix: Prefix, replica_id: str) -> None:
        """The request goes to this replica: what comes behind it counts on its blocks."""
        prefix.predicted_tokens = self.cached_tokens(prefix, (replica_id,))[replica_id]
        if prefix.predicted_tokens is None:
            return
        prefix.replica_id = replica_id
        prefix.awaited = prefix.names[prefix.held.get(replica_id, 0) :].tolist()
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

    def _with_awaited(self, replica_id: str, prefix: Prefix) -> int:
        """So many of its blocks the replica holds, or is going to when it gets to it."""
        blocks, awaited = prefix.held.get(replica_id, 0), self._awaited[replica_id]
        if awaited:
            for name in prefix.names[blocks : prefix.readable].tolist():
                if name not in awaited:
                    break
                blocks += 1
        return blocks
