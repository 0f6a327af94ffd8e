"""Which replica a request goes to, and why.

Pure: what is known of the replicas comes in, a replica's id comes out. The gateway keeps the counts.
A new policy is a class with ``choose`` and a name in ``LOAD_POLICIES``, or a function in ``prefix_router.py``.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hycluster.core import ReplicaLoad
from hycluster.errors import SettingsError, Unavailable
from hycluster.gateway.prefix_router import PREFIX_POLICIES, PoolColumns, PrefixPolicy, PrefixRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A replica that can take the request.

    Attributes:
        own_tokens: tokens that this gateway has outstanding there: still to prefill or to decode. Always fresh.
        own_requests: requests that this gateway has outstanding there.
        load: what the replica last said of itself, a moment old; None if it has not spoken yet.
        spare_rows: how many more rows of bulk it can use; None if it does not say enough to tell.
    """

    replica_id: str
    own_tokens: int = 0
    own_requests: int = 0
    load: ReplicaLoad | None = None
    spare_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """What a policy may look at.

    Attributes:
        tokens: prompt tokens plus output tokens that it may get.
        prompt_tokens, output_tokens: to prefill, output so far among them; and that are expected.
        prefix: names the first blocks of its prompt; None if that is not known.
        session_id: the caller's name for a conversation, None if it gave none.
        bulk: it has to make room for online requests.
    """

    tokens: int
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix: int | None = None
    session_id: str | None = None
    bulk: bool = False


class Policy(Protocol):
    """How to choose."""

    def choose(self, candidates: Sequence[Candidate], request: RouteRequest) -> str:
        """The id of the replica that the request goes to.

        Raises:
            Unavailable: there are no candidates.
        """


class LeastOutstandingTokens:
    """The replica with the least work left, in tokens. The default.

    Requests differ in length by a factor of a thousand, so tokens tell the work where counts of
    requests don't. What this gateway has there it knows exactly; what others have there it takes from
    the replica's last report. Equal ones differ by fewest requests, and then by chance, so that
    several gateways that see the same reports don't all run to the same replica.
    """

    def __init__(self, gateway_id: str, seed: int | None = None) -> None:
        self._gateway_id = gateway_id
        self._random = random.Random(seed)

    def choose(self, candidates: Sequence[Candidate], request: RouteRequest) -> str:
        _require(candidates)
        return min(
            candidates,
            key=lambda candidate: (
                outstanding_tokens(candidate, self._gateway_id),
                candidate.own_requests,
                self._random.random(),
            ),
        ).replica_id


class PowerOfTwoChoices:
    """Of two random replicas, the one with fewer requests: the default of Ray Serve, for comparison.

    Good where reports are old or gateways are many: chance keeps gateways from running to the same
    replica, and two choices keep the longest queue short. It does not see how long requests are.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def choose(self, candidates: Sequence[Candidate], request: RouteRequest) -> str:
        _require(candidates)
        two = self._random.sample(candidates, min(2, len(candidates)))
        return min(two, key=self._requests).replica_id

    @staticmethod
    def _requests(candidate: Candidate) -> int:
        # The report counts every gateway's requests but is a moment old; the own count is a sure lower bound.
        reported = candidate.load.running + candidate.load.waiting if candidate.load else 0
        return max(candidate.own_requests, reported)


class LeftOverCapacity:
    """Bulk rows go where online work leaves most room for them; another policy chooses for all others.

    That one also chooses where a replica does not say enough to tell: it must not look empty, nor full.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def choose(self, candidates: Sequence[Candidate], request: RouteRequest) -> str:
        if request.bulk:
            candidates = _most_spare(candidates)
        return self._policy.choose(candidates, request)


def _most_spare(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    places = most_spare([candidate.spare_rows for candidate in candidates])
    return [candidates[place] for place in places]


def most_spare(spare_rows: Sequence[int | None], enough: float = math.inf) -> Sequence[int]:
    """Places of those with most room for rows of bulk, or with so much; all, if one does not say enough to tell."""
    spare = [rows for rows in spare_rows if rows is not None]
    if not spare or len(spare) < len(spare_rows):
        return range(len(spare_rows))
    least = min(max(spare), enough)
    return [place for place, rows in enumerate(spare) if rows >= least]


class SessionAffinity:
    """Another policy, but the turns of one conversation go to the replica that has the earlier ones in its KV cache.

    A session's home is the candidate that gives the highest hash with its id: every gateway finds the same one
    without being told, nothing is kept, and a replica that comes or goes moves its own share of the sessions and no
    more. A turn goes elsewhere while its home has ``slack_tokens`` more outstanding than the least loaded candidate:
    then waiting there would cost more than computing the earlier turns anew.
    """

    def __init__(self, policy: Policy, gateway_id: str, slack_tokens: int) -> None:
        self._policy = policy
        self._gateway_id = gateway_id
        self._slack_tokens = slack_tokens

    def choose(self, candidates: Sequence[Candidate], request: RouteRequest) -> str:
        session = request.session_id
        if session is None or not candidates:
            return self._policy.choose(candidates, request)
        home = max(candidates, key=lambda candidate: _affinity(session, candidate.replica_id))
        least = min(outstanding_tokens(candidate, self._gateway_id) for candidate in candidates)
        if outstanding_tokens(home, self._gateway_id) <= least + self._slack_tokens:
            return home.replica_id
        return self._policy.choose(candidates, request)


def _affinity(session: str, replica_id: str) -> bytes:
    return hashlib.blake2b(f"{session}\0{replica_id}".encode(), digest_size=8).digest()


def outstanding_tokens(candidate: Candidate, gateway_id: str) -> int:
    """Tokens that a replica has still to prefill or to decode, as far as this gateway knows."""
    reported = candidate.load.outstanding_tokens if candidate.load else {}
    # This gateway's own share of the report is older than what it knows itself.
    others = sum(tokens for gateway, tokens in reported.items() if gateway != gateway_id)
    return candidate.own_tokens + others


class ByBlocks:
    """A policy that goes by what replicas have in their KV caches; another one while none has said that.

    A conversation needs no home then: its blocks say where it was. A replica of which nothing is known is taken for
    empty. Bulk rows go by it as well, but only where there is room for one.

    Attributes:
        step_tokens: of prompts, in one step at most.
    """

    def __init__(self, name: str, unknown: Policy, seed: int | None = None, step_tokens: int = 2048) -> None:
        self._policy = PrefixPolicy(name, seed)
        self._unknown = unknown
        self.step_tokens = step_tokens

    def choose(self, candidates: Sequence[Candidate], request: RouteRequest) -> str:
        """Nobody has said what it holds."""
        return self._unknown.choose(candidates, request)

    def place(self, pool: PoolColumns, request: RouteRequest) -> int:
        """Of the replica that the request goes to, in these columns.

        Raises:
            Unavailable: there is none.
        """
        asked = PrefixRequest(
            prompt_tokens=request.prompt_tokens, output_tokens=request.output_tokens, prefix=request.prefix
        )
        return self._policy.choose(pool, asked)


# By load alone.
LOAD_POLICIES: dict[str, Callable[[str, int | None], Policy]] = {
    "least_outstanding_tokens": LeastOutstandingTokens,
    "power_of_two": lambda _, seed: PowerOfTwoChoices(seed),
}
# By what replicas have in their KV caches; gateways follow these for them.
BY_BLOCKS = tuple(PREFIX_POLICIES)
POLICIES = (*LOAD_POLICIES, *BY_BLOCKS)


def make_policy(
    name: str,
    gateway_id: str,
    seed: int | None = None,
    *,
    session_slack_tokens: int | None = None,
    step_tokens: int = 2048,
) -> Policy:
    """The policy that the settings name (``router.policy``).

    Args:
        gateway_id: this gateway's key in what a replica's load says of gateways.
        seed: fixes what is left to chance, for tests.
        session_slack_tokens: ``router.session_slack_tokens``; None leaves sessions out of account.
        step_tokens: in one step of an engine at most.

    Raises:
        SettingsError: no policy has that name.
    """
    if name not in POLICIES:
        raise SettingsError(f"router.policy: {name!r} is not allowed; must be one of {', '.join(POLICIES)}")
    by_load = LOAD_POLICIES.get(name, LeastOutstandingTokens)
    policy: Policy = LeftOverCapacity(by_load(gateway_id, seed))
    if session_slack_tokens is not None:
        policy = SessionAffinity(policy, gateway_id, session_slack_tokens)
    return ByBlocks(name, policy, seed, step_tokens) if name in BY_BLOCKS else policy


def _require(candidates: Sequence[Candidate]) -> None:
    if not candidates:
        raise Unavailable("no replica can take requests now")
