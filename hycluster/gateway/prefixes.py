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

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.metrics.stats import PrefillStats

from hycluster.engine.block_changes import Names, decode_changes
from hycluster.engine.protocol import BlockNaming, EngineInfo, Frame
from hycluster.gateway.block_index import BlockIndex
from hycluster.gateway.block_names import BlockNamer, reads_cache
from hycluster.gateway.prefix_router import Column
from hycluster.gateway.turnover import Turnover
from hycluster.observe.prefixes import PrefixAudit

# So many tokens of a prompt name its beginning, or so many where it has fewer, or one block.
_BEGIN_TOKENS = (1024, 512, 1)


def _nothing() -> NDArray[np.intp]:
    return np.empty(0, np.intp)


@dataclass(slots=True)
class Prefix:
    """A request's beginning, by blocks.

    Attributes:
        names: of its full blocks; at first of those that somebody has, and some more.
        readable: how many of its full blocks its engine may find: the last token is always computed.
        blocks: how many it has; 0 where none has a name.
        held: by row of the index, how many of these its replica held when the request came.
        expected: the same with what it is going to hold when it gets to the request.
        predicted_tokens: that the replica which has it was to find cached; None: nothing was predicted.
        awaited: names that it is going to store there.
    """

    names: Names
    naming: BlockNaming
    readable: int
    blocks: int = 0
    held: NDArray[np.intp] = field(default_factory=_nothing)
    expected: NDArray[np.intp] = field(default_factory=_nothing)
    predicted_tokens: int | None = None
    replica_id: str = ""
    awaited: Sequence[int] = ()

    def tokens(self, blocks: int) -> int:
        """Of a prompt whose first blocks are there, what need not be computed."""
        return int(self.tokens_by_row(np.array([blocks]))[0])

    def tokens_by_row(self, blocks: NDArray[np.intp]) -> NDArray[np.intp]:
        """The same of several."""
        found: NDArray[np.intp] = np.minimum(blocks, self.readable) - self.naming.computed_again
        return np.maximum(found, 0) * self.naming.tokens

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
        longest_prompt_tokens: that the model takes; None if that is not known.
    """

    audit: PrefixAudit = field(default_factory=PrefixAudit)
    clock: Callable[[], float] = time.monotonic
    longest_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        # Made when the first replica says how large its KV cache is.
        self._index: BlockIndex | None = None
        self._namer = BlockNamer(self.longest_prompt_tokens)
        # By replica that has said what it holds: how it names blocks, and what it is going to store.
        self._naming: dict[str, BlockNaming] = {}
        self._awaited: dict[str, Counter[int]] = {}
        self._turnover = Turnover()
        # Of the replicas that were asked for last; they are the same until one comes or goes.
        self._rows: tuple[list[str], NDArray[np.intp]] | None = None
        # Whether replicas name blocks differently.
        self._unlike = False

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
        was = self._index.row(replica_id)
        self._index.take(replica_id, changes)
        row = self._index.row(replica_id)
        if row != was:
            self._turnover.forget(row)
            self._rows = None
        if self._naming.get(replica_id) is not info.blocks:
            self._naming[replica_id] = info.blocks
            self._unlike = len(set(self._naming.values())) > 1
        self._awaited.setdefault(replica_id, Counter())
        if len(changes.dropped):
            self._turnover.note(row, len(changes.dropped), self.clock())

    def forget(self, replica_id: str) -> None:
        """A replica is gone."""
        if self._index is not None:
            self._index.forget(replica_id)
        self._rows = None
        self._naming.pop(replica_id, None)
        self._unlike = len(set(self._naming.values())) > 1
        self._awaited.pop(replica_id, None)

    # -- requests -------------------------------------------------------------------------------------

    def of(self, request: EngineCoreRequest, output: Sequence[int] = ()) -> Prefix | None:
        """The request's beginning, as the replicas name it, and what they hold of it; None where none has said that.

        Args:
            output: tokens that it has got so far.
        """
        naming = next(iter(self._naming.values()), None)
        if naming is None or self._index is None:
            return None
        names = self._namer.names(request, naming, output, self._somewhere)
        tokens = len(request.prompt_token_ids or ()) + len(output)
        blocks = tokens // naming.tokens if len(names) else 0
        readable = (tokens - 1) // naming.tokens if len(names) and reads_cache(request) else 0
        held = self._index.cached_by_row(names[:readable])
        prefix = Prefix(names, naming, readable, blocks, held, held)
        if any(self._awaited.values()):
            prefix.expected = self._with_awaited(prefix, self._index)
        return prefix

    def seen(self, prefix: Prefix, replica_ids: list[str]) -> tuple[Column, Column] | None:
        """Of a prompt that came just now, by replica.

        Returns:
            What it need not compute, in tokens, where a replica that has said nothing has none; and how long what it
            would drop next has not been used, about, in seconds, infinite where it drops nothing. None, if none of
            them has said what it holds.
        """
        assert self._index is not None
        if self._rows is None or self._rows[0] != replica_ids:
            self._rows = replica_ids, np.array([self._index.row(each) for each in replica_ids], np.intp)
        rows = self._rows[1]
        said = rows >= 0
        if self._unlike:
            said &= np.array([self._naming.get(each) == prefix.naming for each in replica_ids])
        if not said.any():
            return None
        ages = np.where(rows >= 0, self._turnover.ages_s(self._index.counts, self.clock())[rows], np.inf)
        return np.where(said, prefix.tokens_by_row(prefix.expected)[rows], 0).astype(float), ages

    def send(self, prefix: Prefix, replica_id: str) -> None:
        """The request goes to this replica: what comes behind it counts on its blocks."""
        if self._index is None or self._naming.get(replica_id) != prefix.naming:
            prefix.predicted_tokens = None
            return
        row = self._index.row(replica_id)
        prefix.predicted_tokens = prefix.tokens(int(prefix.expected[row]))
        prefix.replica_id = replica_id
        prefix.awaited = prefix.names[int(prefix.held[row]) :].tolist()
        self._awaited[replica_id].update(prefix.awaited)

    def finish(self, prefix: Prefix, request: EngineCoreRequest, output: Sequence[int] = ()) -> None:
        """Name the blocks that nobody had: once the request is sent, since nobody waits for that."""
        self._namer.remember()
        named = len(prefix.names)
        if named == prefix.blocks:
            return
        prefix.names = self._namer.names(request, prefix.naming, output)
        self._namer.remember()
        awaited = self._awaited.get(prefix.replica_id)
        if awaited is not None and prefix.predicted_tokens is not None:
            more = prefix.names[named:].tolist()
            prefix.awaited = [*prefix.awaited, *more]
            awaited.update(more)

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

    def _somewhere(self, name: int) -> bool:
        """Whether a replica has this block, or is going to."""
        assert self._index is not None
        return self._index.held_somewhere(name) or any(name in awaited for awaited in self._awaited.values())

    def _with_awaited(self, prefix: Prefix, index: BlockIndex) -> NDArray[np.intp]:
        """By row, so many of its blocks its replica holds, or is going to when it gets to it."""
        expected, names = prefix.held.tolist(), prefix.names[: prefix.readable].tolist()
        for replica_id, awaited in self._awaited.items():
            if awaited:
                row = index.row(replica_id)
                blocks = expected[row]
                while blocks < len(names) and names[blocks] in awaited:
                    blocks += 1
                expected[row] = blocks
        return np.array(expected, np.intp)
