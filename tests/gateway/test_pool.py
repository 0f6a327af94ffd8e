"""The pool's client against real sockets and simulated engines, on one loop."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import zmq
import zmq.asyncio

from hycluster.core import Priority, ReplicaAddress, ReplicaLoad
from hycluster.directory.directory import ReplicaReport
from hycluster.engine.simulated import SimulatedEngine
from hycluster.errors import HyclusterError, Unavailable
from hycluster.gateway.router import make_policy
from hycluster.replica.peers import Credentials
from hycluster.replica.wire import READY, encode_info
from hycluster.settings.load import DataPlane
from hycluster.settings.simulated import Simulated
from tests.engine_requests import PROMPT, ask
from tests.simulated_pool import ColocatedEngine, SimulatedPool, SimulatedReplica, predicted
from tests.waiting import PATIENCE_S, eventually, until

if TYPE_CHECKING:
    from hycluster.gateway.flight import Flight
    from hycluster.gateway.link import Link
    from hycluster.gateway.pool import PoolClient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

FAST = Simulated(realtime=False)
SLOW = Simulated(step_base_s=0.01, decode_token_s=0.0)


class Pool:
    """Replicas, a client that is connected to all of them, and what it was told of lost requests."""

    def __init__(self, replicas: SimulatedPool, client: PoolClient, lost: dict[str, str]) -> None:
        self.replicas = replicas
        self.client = client
        self.lost = lost

    @property
    def links(self) -> dict[str, Link]:
        """By replica id, what the client has on each."""
        return self.client._members.links

    @property
    def flights(self) -> dict[str, Flight]:
        """By request id, what the client knows of each."""
        return self.client._failover.flights

    async def finish(self, requests: int) -> dict[str, list[int]]:
        """Tokens by request, until this many have ended."""
        tokens: dict[str, list[int]] = {}
        while requests:
            for output in (await self.client.get_output_async()).outputs:
                tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
                requests -= output.finish_reason is not None
        return tokens

    async def running(self, *counts: int) -> None:
        """Wait until the replicas have this many requests each."""
        await asyncio.to_thread(eventually, lambda: tuple(r.requests for r in self.replicas.replicas) == counts)


@asynccontextmanager
async def opened(
    settings: Simulated, replicas: int = 2, wait_s: float = 60.0, kind: type[SimulatedEngine] = SimulatedEngine
) -> AsyncIterator[Pool]:
    from hycluster.gateway.pool import PoolClient

    lost: dict[str, str] = {}

    async def on_lost(request_id: str, error: HyclusterError) -> None:
        lost[request_id] = f"{type(error).__name__}: {error.message}"

    with SimulatedPool(settings, replicas, kind) as simulated:
        policy = make_policy("least_outstanding_tokens", "me", seed=0)
        client = PoolClient("tiny", policy, "me", wait_s=wait_s, on_lost=on_lost)
        try:
            await client.update(simulated.reports)
            yield Pool(simulated, client, lost)
        finally:
            await client.close()


async def test_requests_are_spread_and_answered() -> None:
    async with opened(SLOW) as pool:
        assert pool.client.first_replica.is_set()
        assert pool.client.links == 2
        names = [str(number) for number in range(8)]
        for name in names:
            await pool.client.add_request_async(ask(name))
        assert [len(link.flights) for link in pool.links.values()] == [4, 4]
        assert await pool.finish(8) == dict.fromkeys(names, predicted(PROMPT, 5, SLOW))


async def test_outstanding_tokens_go_down_with_each_step_and_end_at_none() -> None:
    async with opened(SLOW, 1) as pool:
        await pool.client.add_request_async(ask("a", max_tokens=20))
        await pool.client.add_request_async(ask("b", max_tokens=10))
        assert pool.client.outstanding == {"r0": 20 + 10 + 2 * len(PROMPT)}
        assert pool.client.requests_in_flight == 2
        seen, ended = [], 0
        while ended < 2:
            outputs = (await pool.client.get_output_async()).outputs
            seen.append(pool.client.outstanding["r0"])
            ended += sum(output.finish_reason is not None for output in outputs)
        # The prompts are computed with the first token; then at most two tokens a step.
        assert 20 <= len(seen) <= 30
        assert all(0 <= before - after <= 2 + 2 * len(PROMPT) for before, after in itertools.pairwise(seen))
        assert pool.client.outstanding == {"r0": 0}
        assert pool.client.requests_in_flight == 0


async def test_an_early_end_gives_back_what_was_left() -> None:
    async with opened(SLOW, 1) as pool:
        request = ask("a", max_tokens=1000)
        assert request.sampling_params is not None
        request.sampling_params.stop_token_ids = predicted(PROMPT, 3, SLOW)[-1:]
        await pool.client.add_request_async(request)
        assert await pool.finish(1) == {"a": predicted(PROMPT, 3, SLOW)}
        assert pool.client.outstanding == {"r0": 0}


async def test_abort_reaches_the_engine_and_the_books() -> None:
    async with opened(SLOW) as pool:
        for name in "abcd":
            await pool.client.add_request_async(ask(name, max_tokens=10_000))
        await pool.running(2, 2)
        await pool.client.abort_requests_async(["a", "b", "c", "d", "unknown"])
        assert pool.client.outstanding == {"r0": 0, "r1": 0}
        assert pool.client.requests_in_flight == 0
        await pool.running(0, 0)


async def test_no_request_goes_to_a_replica_that_drains() -> None:
    async with opened(SLOW) as pool:
        pool.replicas[0].accepting = False
        await pool.client.update(pool.replicas.reports)
        assert pool.client.links == 1
        for name in "abc":
            await pool.client.add_request_async(ask(name, max_tokens=10_000))
        await pool.running(0, 3)
        pool.replicas[1].accepting = False
        await pool.client.update(pool.replicas.reports)
        assert not pool.client.able
        with pytest.raises(Unavailable, match="no replica of 'tiny' can serve now"):
            await pool.client.add_request_async(ask("d"))
        assert pool.client.requests_in_flight == 3


async def test_what_other_gateways_have_there_counts() -> None:
    async with opened(SLOW) as pool:
        busy, idle = pool.replicas.reports
        busy = ReplicaReport(busy.address, ReplicaLoad(outstanding_tokens={"another": 1_000_000}))
        await pool.client.update([busy, idle])
        for name in "abc":
            await pool.client.add_request_async(ask(name, max_tokens=10_000))
        await pool.running(0, 3)


async def test_a_lost_replicas_requests_without_output_go_to_another() -> None:
    async with opened(SLOW) as pool:
        pool.replicas[0].engine.hang()
        for name in "abcd":
            await pool.client.add_request_async(ask(name))
        assert set(await pool.finish(2)) < set("abcd")
        await pool.running(2, 0)
        pool.replicas[0].die()
        rest = await pool.finish(2)
        assert list(rest.values()) == [predicted(PROMPT, 5, SLOW)] * 2
        assert pool.lost == {}
        assert pool.client.outstanding == {"r1": 0}
        assert pool.client.requests_in_flight == 0


async def test_an_abort_while_a_request_changes_replicas_ends_it() -> None:
    async with opened(SLOW) as pool:
        pool.replicas[0].engine.hang()
        for name in "ab":
            await pool.client.add_request_async(ask(name, max_tokens=10_000))
        await pool.running(1, 1)
        (hanging,) = pool.links["r0"].flights
        pool.links["r0"].lose("the test says so")
        await pool.client.abort_requests_async([hanging])
        assert pool.client.requests_in_flight == 1
        await asyncio.sleep(0.1)
        assert pool.replicas[1].requests == 1
        assert pool.client.requests_in_flight == 1


async def test_a_lost_replicas_requests_go_on_behind_the_tokens_that_they_have() -> None:
    async with opened(SLOW) as pool:
        for name in "ab":
            await pool.client.add_request_async(ask(name, max_tokens=60))
        tokens: dict[str, list[int]] = {"a": [], "b": []}
        while min(map(len, tokens.values())) < 10:
            for output in (await pool.client.get_output_async()).outputs:
                tokens[output.request_id] += output.new_token_ids
        pool.replicas[0].die()
        for name, rest in (await pool.finish(2)).items():
            tokens[name] += rest
        assert tokens == dict.fromkeys("ab", predicted(PROMPT, 60, SLOW))
        assert pool.lost == {}
        assert pool.client.outstanding == {"r1": 0}
        assert pool.client.requests_in_flight == 0


async def test_what_the_loss_of_a_replica_costs_is_counted() -> None:
    async with opened(SLOW) as pool:
        for name in "ab":
            await pool.client.add_request_async(ask(name, max_tokens=60))
        begun: set[str] = set()
        while len(begun) < 2:
            begun |= {output.request_id for output in (await pool.client.get_output_async()).outputs}
        pool.replicas[0].die()
        await pool.finish(2)
        migrated = pool.client.migrated
        assert migrated.requests == 1
        assert len(PROMPT) < migrated.tokens < len(PROMPT) + 60
        assert sum(migrated.pauses) == 1
        assert migrated.paused_s > 0


async def test_a_request_that_moved_can_be_aborted() -> None:
    async with opened(SLOW) as pool:
        for name in "ab":
            await pool.client.add_request_async(ask(name, max_tokens=10_000))
        await pool.running(1, 1)
        pool.replicas[0].die()
        await asyncio.to_thread(eventually, lambda: pool.replicas[1].requests == 2)
        await pool.client.abort_requests_async(["a", "b"])
        await asyncio.to_thread(eventually, lambda: pool.replicas[1].requests == 0)
        assert pool.client.outstanding == {"r1": 0}


async def test_what_an_ending_replica_gives_back_goes_on_elsewhere() -> None:
    async with opened(SLOW) as pool:
        for name in "ab":
            await pool.client.add_request_async(ask(name, max_tokens=40))
        await pool.running(1, 1)
        (flight,) = pool.links["r0"].flights.values()
        # As an engine does that shuts down: it aborts what it has, and says so.
        pool.replicas[0].accepting = False
        await pool.client.update(pool.replicas.reports)
        pool.replicas[0].engine.give_back()
        tokens = await pool.finish(2)
        assert tokens == dict.fromkeys("ab", predicted(PROMPT, 40, SLOW))
        assert pool.links["r0"].flights == {}
        assert flight.losses == 0


async def test_a_request_waits_for_a_place() -> None:
    async with opened(SLOW, 1) as pool:
        await pool.client.add_request_async(ask("a", max_tokens=40))
        await pool.running(1)
        pool.replicas[0].die()
        await until(lambda: pool.client.links == 0)
        # No news for those who come now; those who are here wait.
        with pytest.raises(Unavailable):
            await pool.client.add_request_async(ask("b"))
        assert pool.client.requests_in_flight == 1
        successor = SimulatedReplica(SLOW, "r1")
        try:
            await pool.client.update([successor.report])
            assert (await pool.finish(1))["a"][-5:] == predicted(PROMPT, 40, SLOW)[-5:]
            assert pool.lost == {}
        finally:
            successor.close()


async def test_a_place_is_not_waited_for_without_end() -> None:
    async with opened(SLOW, 1, wait_s=0.1) as pool:
        pool.replicas[0].engine.hang()
        await pool.client.add_request_async(ask("a"))
        await pool.running(1)
        pool.replicas[0].die()
        await until(lambda: "a" in pool.lost)
        assert pool.lost["a"].startswith("ReplicaLost: the replica that ran this request was lost, and there was no")
        assert not pool.client.able
        assert pool.client.outstanding == {}
        assert pool.client.requests_in_flight == 0


async def test_a_replica_that_ends_after_it_drained_has_not_died() -> None:
    async with opened(SLOW, 1, wait_s=0.1) as pool:
        await pool.client.add_request_async(ask("a", max_tokens=10_000))
        await pool.running(1)
        pool.replicas[0].accepting = False
        await pool.client.update(pool.replicas.reports)
        pool.replicas[0].die()
        await until(lambda: bool(pool.lost))
        assert pool.lost["a"].startswith("Unavailable: ")


class TestRequestsThatKill:
    @staticmethod
    async def kill_whoever_has(pool: Pool, name: str) -> None:
        """The replica that has it dies, but not before its engine is known to have it."""

        def flight() -> Flight | None:
            found = pool.flights.get(name)
            return found if found is not None and (found.taken or not found.losses) else None

        await until(lambda: (it := flight()) is not None and it.replica_id in pool.links)
        found = flight()
        assert found is not None
        victim = next(r for r in pool.replicas.replicas if r.address.replica_id == found.replica_id)
        await asyncio.to_thread(eventually, lambda: victim.requests > 0)
        links = pool.client.links
        victim.die()
        await until(lambda: pool.client.links < links)

    async def test_it_is_not_migrated_through_the_whole_pool(self) -> None:
        async with opened(SLOW, 5) as pool:
            for replica in pool.replicas.replicas:
                replica.engine.hang()
            await pool.client.add_request_async(ask("a"))
            for _ in range(3):
                assert pool.lost == {}
                await self.kill_whoever_has(pool, "a")
            await until(lambda: bool(pool.lost))
            assert pool.lost["a"].startswith("KillsReplicas: this request was on 3 replicas in a row when they died")
            assert pool.client.links == 2
            assert pool.client.requests_in_flight == 0

    async def test_one_that_gets_on_is_not_suspected(self) -> None:
        """It has seen more replicas die than a killer may, and has tokens of each."""
        async with opened(SLOW, 6) as pool:
            await pool.client.add_request_async(ask("a", max_tokens=400))
            for _ in range(5):
                await until(lambda: (flight := pool.flights["a"]).begun and flight.made >= 8)
                await self.kill_whoever_has(pool, "a")
            assert (await pool.finish(1))["a"] == predicted(PROMPT, 400, SLOW)
            assert pool.lost == {}

    async def test_a_death_before_the_engine_had_it_does_not_count(self) -> None:
        async with opened(SLOW, 3) as pool:
            for replica in pool.replicas.replicas:
                replica.engine.hang()
            await pool.client.add_request_async(ask("a"))
            await self.kill_whoever_has(pool, "a")
            await until(lambda: pool.flights["a"].replica_id in pool.links)
            flight = pool.flights["a"]
            flight.taken = False
            assert flight.losses == 1
            pool.links[flight.replica_id].lose("it was dead already")
            assert pool.flights["a"].losses == 1

    async def test_two_that_are_suspected_do_not_share_a_replica(self) -> None:
        async with opened(SLOW, 4) as pool:
            for replica in pool.replicas.replicas:
                replica.engine.hang()
            for name in "ab":
                await pool.client.add_request_async(ask(name))
                pool.flights[name].deaths = 2
            for link in list(pool.links.values())[:2]:
                link.lose("the test says so", died=False)
            await until(lambda: all(f.replica_id in pool.links for f in pool.flights.values()))
            assert len({flight.replica_id for flight in pool.flights.values()}) == 2
            # With one replica left, the second waits for the first.
            next(iter(pool.links.values())).lose("the test says so", died=False)
            await asyncio.sleep(0.1)
            (link,) = pool.links.values()
            assert len(link.flights) == 1
            (first,) = link.flights.values()
            await pool.client.abort_requests_async([first.request_id])
            await until(lambda: len(link.flights) == 1)
            assert next(iter(link.flights.values())) is not first


async def test_a_replica_whose_process_is_gone() -> None:
    """No word that its engine ended: the connections close, and that is all."""
    async with opened(SLOW) as pool:
        with (
            zmq.asyncio.Context() as context,
            context.socket(zmq.ROUTER) as requests,
            context.socket(zmq.ROUTER) as outputs,
        ):
            keys = Credentials.made(encrypted=True)
            for sock in (requests, outputs):
                sock.curve_server, sock.curve_secretkey = True, keys.server_secret.encode()
            inward, outward = (
                f"tcp://127.0.0.1:{sock.bind_to_random_port('tcp://127.0.0.1')}" for sock in (requests, outputs)
            )
            there = ReplicaAddress(
                "short", "tiny", inward, outward, "x", 6.0, keys.server_key, keys.client_key, keys.client_secret
            )
            joining = asyncio.create_task(pool.client.update([ReplicaReport(there, ReplicaLoad())]))
            identity, *hello = await requests.recv_multipart()
            assert hello == [b"H", b"x"]
            await requests.send_multipart([identity, READY, encode_info(pool.replicas[0].engine.info)])
            await joining
            assert pool.client.links == 3
        await until(lambda: pool.client.links == 2)
        for name in "ab":
            await pool.client.add_request_async(ask(name))
        assert set(await pool.finish(2)) == set("ab")


async def test_a_replica_that_takes_this_gateway_for_gone() -> None:
    async with opened(SLOW) as pool:
        server = pool.replicas[0].server
        for client in list(server._identities):
            server._forget(client)
        # Whichever goes there first is refused, and finds its way.
        for name in "ab":
            await pool.client.add_request_async(ask(name))
        assert set(await pool.finish(2)) == set("ab")
        # And the replica is found again.
        await pool.client.update(pool.replicas.reports)
        assert pool.client.links == 2


async def test_control_calls_reach_every_replica() -> None:
    async with opened(FAST) as pool:
        assert await pool.client.call_all("get_supported_tasks") == [["generate"], ["generate"]]
        with pytest.raises(RuntimeError, match="sleep"):
            await pool.client.sleep_async()
        assert await pool.client.get_supported_tasks_async() == ("generate",)


async def test_control_calls_without_replicas() -> None:
    async with opened(FAST, 0) as pool:
        assert not pool.client.able
        assert not pool.client.first_replica.is_set()
        with pytest.raises(Unavailable):
            await pool.client.call_all("get_supported_tasks")


def address(endpoint: str, token: str = "token") -> ReplicaAddress:
    return ReplicaAddress("dead", "tiny", endpoint, endpoint, token)


async def test_two_updates_at_once_connect_once() -> None:
    """A second link in the first one's place would not know the requests that went out by that one."""
    async with opened(SLOW, 1) as pool:
        pool.replicas.start()
        await asyncio.gather(*(pool.client.update(pool.replicas.reports) for _ in range(3)))
        assert pool.client.links == 2
        assert [replica.server.gateways for replica in pool.replicas.replicas] == [1, 1]
        for name in "abcd":
            await pool.client.add_request_async(ask(name, max_tokens=10_000))
        await pool.client.abort_requests_async(list("abcd"))
        assert pool.client.requests_in_flight == 0


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is given up because it has taken long."""
    monkeypatch.setattr("hycluster.gateway.members.JOIN_PATIENCE_S", 600)
    monkeypatch.setattr("hycluster.gateway.connection.HELLO_TIMEOUT_S", 600)


@pytest.mark.usefixtures("patient")
async def test_a_dead_address_is_given_up_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with opened(FAST) as pool:
        dead = ReplicaReport(address(f"tcp://127.0.0.1:{port}"), ReplicaLoad())
        async with asyncio.timeout(PATIENCE_S):
            await pool.client.update([*pool.replicas.reports, dead])
        assert pool.client.outstanding.keys() == {"r0", "r1"}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("wrong", ["token", "server_key", "client_key"])
async def test_wrong_credentials_are_given_up_at_once(wrong: str) -> None:
    async with opened(FAST) as pool:
        changed: Any = {wrong: Credentials.made(encrypted=True).client_key}
        stranger = replace(pool.replicas[0].address, replica_id="other", **changed)
        async with asyncio.timeout(PATIENCE_S):
            await pool.client.update([ReplicaReport(stranger, ReplicaLoad())])
        assert pool.client.outstanding.keys() == {"r0", "r1"}


async def test_replicas_that_encrypt_and_others_are_one_pool() -> None:
    """As while a change of the setting is rolled out, and when the one that changed first is lost."""
    async with opened(SLOW, 1) as pool:
        pool.replicas.replicas.append(SimulatedReplica(SLOW, "r1", ports=DataPlane(host="127.0.0.1", encrypted=False)))
        await pool.client.update(pool.replicas.reports)
        for name in "abcd":
            await pool.client.add_request_async(ask(name, max_tokens=100))
        await pool.running(2, 2)
        pool.replicas[1].die()
        assert await pool.finish(4) == dict.fromkeys("abcd", predicted(PROMPT, 100, SLOW))


async def test_a_message_of_any_length_arrives() -> None:
    settings = Simulated(realtime=False, max_model_len=200_000, kv_blocks=20_000)
    async with opened(settings, 1) as pool:
        request = ask("a")
        request.prompt_token_ids = list(range(70_000, 70_000 + 150_000))
        await pool.client.add_request_async(request)
        assert await pool.finish(1) == {"a": predicted(request.prompt_token_ids, 5, settings)}


async def test_an_address_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from hycluster.gateway import connection

    monkeypatch.setattr(connection, "HELLO_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        async with opened(FAST) as pool:
            silent = address(f"tcp://127.0.0.1:{mute.getsockname()[1]}")
            await pool.client.update([ReplicaReport(silent, ReplicaLoad())])
            assert pool.client.outstanding.keys() == {"r0", "r1"}


async def test_goodbye_drops_what_is_in_flight() -> None:
    async with opened(SLOW) as pool:
        for name in "ab":
            await pool.client.add_request_async(ask(name, max_tokens=10_000))
        await pool.running(1, 1)
        await pool.client.close()
        await pool.running(0, 0)
        assert [replica.server.gateways for replica in pool.replicas.replicas] == [0, 0]


async def test_outputs_are_labelled_by_replica() -> None:
    async with opened(SLOW) as pool:
        for name in "ab":
            await pool.client.add_request_async(ask(name))
        labels = {(await pool.client.get_output_async()).engine_index for _ in range(10)}
        assert labels == {known.source(bulk=False) for known in pool.client.known}
        assert len(labels) == 2


async def test_bulk_rows_go_where_online_requests_leave_room() -> None:
    async with opened(SLOW, kind=ColocatedEngine) as pool:
        for number in range(12):
            await pool.client.add_request_async(ask(f"online-{number}", max_tokens=100))
        await pool.running(6, 6)
        # The first serves its online requests only.
        pool.replicas[0].engine.parked = 99  # type: ignore[attr-defined]
        for number in range(4):
            await pool.client.add_request_async(ask(f"bulk-{number}", max_tokens=100, priority=Priority.BATCH))
        await asyncio.to_thread(eventually, lambda: all(r.load.running == 8 for r in pool.replicas.reports))
        for link in pool.links.values():
            # As if what was before were long ago.
            link.room._used.clear()
        await pool.client.update(pool.replicas.reports)
        rows = {replica_id: link.room.rows for replica_id, link in pool.links.items()}
        assert rows == {"r0": 0 + 8, "r1": 64 - 6 + 8}
        assert {room.rows for room in pool.client.rooms} == set(rows.values())
        for number in range(4, 40):
            await pool.client.add_request_async(ask(f"bulk-{number}", max_tokens=100, priority=Priority.BATCH))
        await pool.running(8, 44)
        # It dies, and they go on at the other.
        pool.replicas[1].die()
        await until(lambda: len(pool.links) == 1)
        await until(lambda: pool.links["r0"].bulk_rows == 40)


async def test_bulk_rows_are_counted_to_none() -> None:
    async with opened(SLOW, kind=ColocatedEngine) as pool:
        begun_s = time.monotonic()
        for number in range(4):
            await pool.client.add_request_async(ask(f"bulk-{number}", priority=Priority.BATCH))
        assert sum(link.bulk_rows for link in pool.links.values()) == 4
        await pool.client.abort_requests_async(["bulk-3"])
        await pool.finish(3)
        assert [link.bulk_rows for link in pool.links.values()] == [0, 0]
        assert begun_s < pool.client.progress_s < time.monotonic()
