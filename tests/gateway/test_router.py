from __future__ import annotations

import random
from collections.abc import Callable
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hycluster.core import ReplicaLoad
from hycluster.errors import SettingsError, Unavailable
from hycluster.gateway.router import (
    BY_BLOCKS,
    POLICIES,
    Candidate,
    LeastOutstandingTokens,
    Policy,
    PowerOfTwoChoices,
    RouteRequest,
    SessionAffinity,
    make_policy,
    most_spare,
)
from hycluster.settings.load import Router

REQUEST = RouteRequest(tokens=100)

loads = st.builds(
    ReplicaLoad,
    running=st.integers(0, 100),
    waiting=st.integers(0, 100),
    outstanding_tokens=st.dictionaries(st.sampled_from(["me", "you", "they"]), st.integers(0, 10_000)),
)
candidate_lists = st.lists(
    st.builds(
        Candidate,
        replica_id=st.text(min_size=1, max_size=5),
        own_tokens=st.integers(0, 10_000),
        own_requests=st.integers(0, 100),
        load=st.none() | loads,
    ),
    min_size=1,
    max_size=10,
    unique_by=lambda candidate: candidate.replica_id,
)


def route(policy: Policy, replicas: int, requests: int) -> dict[str, int]:
    """Send equal requests, none of which ends; how many each replica got."""
    counts = {str(number): 0 for number in range(replicas)}
    for _ in range(requests):
        candidates = [
            Candidate(replica_id=replica, own_tokens=count * REQUEST.tokens, own_requests=count)
            for replica, count in counts.items()
        ]
        counts[policy.choose(candidates, REQUEST)] += 1
    return counts


@pytest.mark.parametrize("name", POLICIES)
@given(candidates=candidate_lists, seed=st.integers(0, 1000))
def test_always_a_candidate(name: str, candidates: list[Candidate], seed: int) -> None:
    policy = make_policy(name, "me", seed)
    assert policy.choose(candidates, REQUEST) in {candidate.replica_id for candidate in candidates}


@pytest.mark.parametrize("name", POLICIES)
def test_no_candidates(name: str) -> None:
    with pytest.raises(Unavailable, match="no replica"):
        make_policy(name, "me").choose([], REQUEST)


def test_the_settings_offer_these_policies() -> None:
    assert get_args(Router.model_fields["policy"].annotation) == POLICIES


def test_unknown_policy() -> None:
    with pytest.raises(SettingsError, match="'nearest' is not allowed; must be one of least_outstanding_tokens, power"):
        make_policy("nearest", "me")


@given(candidates=candidate_lists)
def test_least_outstanding_picks_the_least(candidates: list[Candidate]) -> None:
    def outstanding(candidate: Candidate) -> int:
        reported = dict(candidate.load.outstanding_tokens) if candidate.load else {}
        return candidate.own_tokens + reported.get("you", 0) + reported.get("they", 0)

    chosen = LeastOutstandingTokens("me", seed=1).choose(candidates, REQUEST)
    best = min((outstanding(candidate), candidate.own_requests) for candidate in candidates)
    (winner,) = (candidate for candidate in candidates if candidate.replica_id == chosen)
    assert (outstanding(winner), winner.own_requests) == best


def test_own_count_is_not_taken_twice() -> None:
    busy = Candidate(replica_id="mine", own_tokens=50, load=ReplicaLoad(outstanding_tokens={"me": 900}))
    other = Candidate(replica_id="theirs", own_tokens=0, load=ReplicaLoad(outstanding_tokens={"you": 60}))
    assert LeastOutstandingTokens("me").choose([busy, other], REQUEST) == "mine"
    assert LeastOutstandingTokens("you").choose([busy, other], REQUEST) == "theirs"


@given(replicas=st.integers(1, 12), requests=st.integers(0, 60), seed=st.integers(0, 1000))
def test_equal_requests_are_spread_evenly(replicas: int, requests: int, seed: int) -> None:
    counts = route(LeastOutstandingTokens("me", seed), replicas, requests).values()
    assert sum(counts) == requests
    assert max(counts) - min(counts) <= 1


def test_gateways_do_not_run_to_the_same_replica() -> None:
    idle = [Candidate(replica_id=str(number), load=ReplicaLoad()) for number in range(8)]
    first = {LeastOutstandingTokens(f"gateway-{seed}", seed).choose(idle, REQUEST) for seed in range(100)}
    assert len(first) == 8


@pytest.mark.parametrize("name", POLICIES)
def test_a_seed_fixes_the_choices(name: str) -> None:
    assert route(make_policy(name, "me", 3), 5, 40) == route(make_policy(name, "me", 3), 5, 40)


def test_power_of_two_never_takes_the_worst_of_two() -> None:
    few, many = Candidate(replica_id="few", own_requests=1), Candidate(replica_id="many", own_requests=2)
    policy = PowerOfTwoChoices(seed=0)
    assert {policy.choose([few, many], REQUEST) for _ in range(50)} == {"few"}


def test_power_of_two_sees_the_requests_of_others() -> None:
    mine = Candidate(replica_id="mine", own_requests=3, load=ReplicaLoad(running=1))
    theirs = Candidate(replica_id="theirs", load=ReplicaLoad(running=2, waiting=2))
    policy = PowerOfTwoChoices(seed=0)
    assert {policy.choose([mine, theirs], REQUEST) for _ in range(50)} == {"mine"}


def test_power_of_two_beats_chance_on_the_longest_queue() -> None:
    class Chance:
        def __init__(self, seed: int) -> None:
            self._random = random.Random(seed)

        def choose(self, candidates: list[Candidate], request: RouteRequest) -> str:
            return self._random.choice(candidates).replica_id

    def longest(make: Callable[[int], Policy]) -> int:
        return sum(max(route(make(seed), 50, 250).values()) for seed in range(5))

    assert longest(PowerOfTwoChoices) < 0.8 * longest(Chance)  # type: ignore[arg-type]


class TestSessionAffinity:
    SLACK = 1000

    def policy(self, gateway: str = "me") -> Policy:
        return make_policy("least_outstanding_tokens", gateway, session_slack_tokens=self.SLACK)

    @staticmethod
    def homes(policy: Policy, replicas: list[str], sessions: int = 300) -> dict[str, str]:
        candidates = [Candidate(replica_id=replica) for replica in replicas]
        return {
            session: policy.choose(candidates, RouteRequest(tokens=1, session_id=session))
            for session in (f"session-{number}" for number in range(sessions))
        }

    def test_every_gateway_finds_the_same_home(self) -> None:
        homes = self.homes(self.policy(), ["a", "b", "c"])
        assert self.homes(self.policy("you"), ["c", "a", "b"]) == homes
        # A third each, give or take four standard deviations.
        assert all(67 <= list(homes.values()).count(replica) <= 133 for replica in "abc")

    def test_a_replica_that_goes_moves_its_own_sessions_only(self) -> None:
        before, after = self.homes(self.policy(), ["a", "b", "c"]), self.homes(self.policy(), ["a", "b"])
        assert {session for session in before if before[session] != after[session]} == {
            session for session, home in before.items() if home == "c"
        }

    def test_a_home_that_is_much_more_loaded_is_left(self) -> None:
        (home,) = self.homes(self.policy(), ["a", "b"], sessions=1).values()

        def choose(ahead_tokens: int) -> str:
            candidates = [
                Candidate(replica_id=replica, own_tokens=500 + ahead_tokens * (replica == home)) for replica in "ab"
            ]
            return self.policy().choose(candidates, RouteRequest(tokens=1, session_id="session-0"))

        assert choose(self.SLACK) == home
        assert choose(self.SLACK + 1) != home

    def test_what_other_gateways_have_there_counts(self) -> None:
        (home,) = self.homes(self.policy(), ["a", "b"], sessions=1).values()
        busy = ReplicaLoad(outstanding_tokens={"you": self.SLACK + 1})
        candidates = [Candidate(replica_id=replica, load=busy if replica == home else None) for replica in "ab"]
        assert self.policy().choose(candidates, RouteRequest(tokens=1, session_id="session-0")) != home

    def test_without_a_session_the_policy_decides(self) -> None:
        candidates = [Candidate(replica_id="a", own_tokens=1), Candidate(replica_id="b")]
        assert {self.policy().choose(candidates, REQUEST) for _ in range(20)} == {"b"}

    def test_none_turns_it_off(self) -> None:
        assert not isinstance(make_policy("least_outstanding_tokens", "me"), SessionAffinity)

    def test_no_candidates(self) -> None:
        with pytest.raises(Unavailable):
            self.policy().choose([], RouteRequest(tokens=1, session_id="s"))


class TestBulk:
    """Bulk rows, by what online work leaves."""

    def policy(self) -> Policy:
        return make_policy("least_outstanding_tokens", "me", seed=0, session_slack_tokens=100)

    def candidates(self, *spare: int | None) -> list[Candidate]:
        return [
            Candidate(replica_id=str(number), own_tokens=number, spare_rows=rows) for number, rows in enumerate(spare)
        ]

    @pytest.mark.parametrize(
        ("spare", "chosen"),
        [
            ((0, 7, 3), "1"),
            # Also where there is none: it waits where it waits least.
            ((-9, -4, -7), "1"),
            ((5, 5, 5), "0"),
            ((0, None, 3), "0"),
        ],
    )
    def test_they_go_where_there_is_most_room(self, spare: tuple[int | None, ...], chosen: str) -> None:
        request = RouteRequest(tokens=10, bulk=True)
        assert self.policy().choose(self.candidates(*spare), request) == chosen

    def test_online_requests_do_not_look_at_it(self) -> None:
        assert self.policy().choose(self.candidates(0, 7, 3), REQUEST) == "0"

    def test_a_session_of_bulk_keeps_its_home(self) -> None:
        request = RouteRequest(tokens=10, session_id="s", bulk=True)
        home = self.policy().choose(self.candidates(0, 0, 0), request)
        spare = [0 if str(number) == home else 9 for number in range(3)]
        assert self.policy().choose(self.candidates(*spare), request) == home


@pytest.mark.parametrize("name", BY_BLOCKS)
def test_while_nobody_says_what_it_holds_they_go_by_load_and_session(name: str) -> None:
    by_blocks, by_load = (
        make_policy(each, "me", 0, session_slack_tokens=100) for each in (name, "least_outstanding_tokens")
    )
    pool = [Candidate(replica_id=str(number), own_tokens=10 * number) for number in range(4)]
    for session in map(str, range(20)):
        request = RouteRequest(tokens=1, session_id=session)
        assert by_blocks.choose(pool, request) == by_load.choose(pool, request)
    busy = [Candidate(replica_id="a", own_tokens=1000), Candidate(replica_id="b")]
    assert by_blocks.choose(busy, RouteRequest(tokens=1100, session_id="s")) == "b"


@pytest.mark.parametrize(
    ("spare", "places"),
    [([0, 2, 9], [1, 2]), ([0, 0], [0, 1]), ([0, None, 9], [0, 1, 2]), ([], [])],
    ids=["some have room", "none has", "one says nothing", "there is none"],
)
def test_who_has_room_for_one_row_of_bulk(spare: list[int | None], places: list[int]) -> None:
    assert list(most_spare(spare, enough=1)) == places
