"""A request on its way: what it has so far, and what may be said of the replicas that died with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hycluster.core import Priority
from hycluster.errors import HyclusterError, KillsReplicas, ReplicaLost, Unavailable
from hycluster.timeline import Track

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

    from hycluster.gateway.prefixes import Prefix

# A replica that made so many tokens of a request did not die of it, unless the next ones do at the same place too.
CLEARED_AFTER_TOKENS = 8
# From so many deaths in a row on, a request has a replica to itself among those that are suspected like it.
SUSPECTED_AFTER_DEATHS = 2
# Replicas in a row that may die soon after they got the same request; then it is taken for what they died of.
MOST_LOSSES = 2
# How often a request may go to another replica in all.
MOST_MOVES = 20


@dataclass(slots=True, eq=False)
class Flight:
    """A request that has not finished. There is one of it, from its caller's call to its end, and it changes in place.

    Attributes:
        request: as its caller sent it.
        keep: ``output`` is kept, so that another replica can go on with it.
        replica_id: where it is; empty while no replica has it.
        tokens_left: to prefill and decode there.
        prefill_tokens: that are to prefill there before its first token, as far as is known: what is cached is not.
        output: all tokens so far, whoever made them.
        made: tokens that this replica made of it.
        begun: this replica has said something of it.
        deaths: replicas in a row that died when it was on them, each before it had made ``CLEARED_AFTER_TOKENS`` more.
        losses: those of them whose engine is known to have had it.
        moves: how often it has changed replicas.
        taken: this replica's engine is known to have had it.
        track: what is told of it afterwards.
        prefix: its beginning, where it is known what replicas have in their KV caches.
        bulk: it has to make room for others.
    """

    request: EngineCoreRequest
    keep: bool = True
    replica_id: str = ""
    tokens_left: int = 0
    prefill_tokens: int = 0
    output: list[int] = field(default_factory=list)
    made: int = 0
    begun: bool = False
    deaths: int = 0
    losses: int = 0
    moves: int = 0
    taken: bool = False
    track: Track | None = None
    prefix: Prefix | None = None
    bulk: bool = field(init=False)

    def __post_init__(self) -> None:
        # Asked for at each of its outputs.
        self.bulk = self.request.priority >= Priority.BATCH

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def engine_id(self) -> str:
        """What engines know it by: another name on each, as one that was taken for lost may have it still."""
        return f"{self.request_id}~{self.moves}" if self.moves else self.request_id

    @property
    def output_tokens(self) -> int:
        """That it has so far; without ``keep``, of this replica."""
        return len(self.output) if self.keep else self.made

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids or ())

    @property
    def tokens_to_compute(self) -> int:
        """Tokens that a replica has to prefill or decode for it, if it comes to one now."""
        params = self.request.sampling_params
        longest = (params.max_tokens or 0) if params is not None else 0
        return self.prompt_tokens + max(longest, len(self.output))

    def expected_tokens(self, output_tokens: int) -> int:
        """What is likely to be left of it to prefill or decode, at least 1.

        Args:
            output_tokens: how long outputs are expected to be, where a longer one is allowed.
        """
        params = self.request.sampling_params
        longest = (params.max_tokens or output_tokens) if params is not None else 0
        prompt = 0 if self.begun else self.prompt_tokens + len(self.output)
        return max(1, prompt + min(longest, output_tokens) - max(self.made, len(self.output)))

    @property
    def suspected(self) -> bool:
        """Replicas have died with it, one after the other, and this one has not yet shown that it lives."""
        return self.deaths >= SUSPECTED_AFTER_DEATHS and self.made < CLEARED_AFTER_TOKENS

    def sent(self, replica_id: str) -> None:
        """That replica is to compute it, from its prompt and its tokens so far."""
        cached = self.prefix.predicted_tokens if self.prefix is not None else None
        self.replica_id, self.tokens_left = replica_id, self.tokens_to_compute
        self.prefill_tokens = self.prompt_tokens + len(self.output) - (cached or 0)
        self.made, self.begun, self.taken = 0, False, False

    def take(self, tokens: list[int]) -> int:
        """Output of its replica has come. Returns by how much ``tokens_left`` has gone down."""
        step = len(tokens)
        if not self.begun:
            # Until here, the replica had all of it to prefill.
            self.begun = True
            step += self.prompt_tokens + len(self.output)
        if self.keep:
            self.output += tokens
        self.made += len(tokens)
        self.tokens_left -= step
        return step

    def verdict(self, *, died: bool) -> HyclusterError | None:
        """Why it may not go to another replica, now that it has lost one; None if it may."""
        if self.begun and not self.keep:
            return (ReplicaLost if died else Unavailable)("the replica that ran this request was lost")
        if self.losses > MOST_LOSSES:
            return KillsReplicas(
                f"this request was on {self.losses} replicas in a row when they died, each time soon after it came;"
                " it is not sent to another one"
            )
        if self.moves > MOST_MOVES:
            return Unavailable(f"this request has lost its replica {self.moves} times")
        return None

    def lost(self, *, died: bool) -> None:
        """Its replica is gone; what is known of its time there stays until it is sent to another one.

        Args:
            died: of itself or by force, not at the end of a drain. It is held against the request only where the engine
                is known to have had it: one that was sent to a replica that was dead already says nothing about it.
        """
        counts = died and (self.begun or self.taken or self.deaths == 0)
        if self.made >= CLEARED_AFTER_TOKENS:
            self.deaths = self.losses = 0
        self.deaths += died
        self.losses += counts
        self.moves += 1
        self.replica_id = ""
