"""The product's own policies, for engines in virtual time."""

from __future__ import annotations

import time

from hycluster.errors import SettingsError
from hycluster.gateway.prefix_router import PoolColumns, PrefixPolicy, PrefixRequest
from hycluster.gateway.router import BY_BLOCKS, POLICIES, Candidate, RouteRequest, make_policy


class Choice:
    """Chooses a replica by one of the router's policies.

    Attributes:
        by_prefix: the policy looks at what replicas have cached.
        took_s: real seconds of each choice.

    Raises:
        SettingsError: no policy has that name.
    """

    def __init__(self, name: str, seed: int) -> None:
        if name not in POLICIES:
            raise SettingsError(f"--policy: {name!r} is not allowed; must be one of {', '.join(POLICIES)}")
        self.by_prefix = name in BY_BLOCKS
        self.took_s: list[float] = []
        self._prefix = PrefixPolicy(name, seed) if self.by_prefix else None
        self._load = None if self.by_prefix else make_policy(name, "simulation", seed)

    def choose(self, view: PoolColumns, request: PrefixRequest) -> int:
        """The place of a replica in the view."""
        if self._prefix is not None:
            return self._prefix.choose(view, request)
        candidates = [
            Candidate(replica_id=str(place), own_tokens=tokens, own_requests=requests)
            for place, (tokens, requests) in enumerate(
                zip(view.outstanding_tokens.tolist(), view.requests.tolist(), strict=True)
            )
        ]
        assert self._load is not None
        route = RouteRequest(tokens=request.prompt_tokens + request.output_tokens)
        return int(self._load.choose(candidates, route))

    def note_time(self, begun: float) -> None:
        """A choice that began then, on the clock of ``time.perf_counter``, is made."""
        self.took_s.append(time.perf_counter() - begun)
