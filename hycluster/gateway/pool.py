"""The pool as one engine core: what ``AsyncLLM`` talks to in the place of vLLM's own client.

Sends each request to the replica that the router chooses, over a link to each (``hycluster/gateway/members.py`` and
``link.py``), and gathers the outputs of all. A request whose replica is lost goes on elsewhere (``failover.py``).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from hycluster.auth.caller import current_caller, own_salt
from hycluster.core import BulkDemand, ColocationLoad, EngineSample, ExpertLoad, GatewayWork, Priority, ReplicaLoad
from hycluster.directory.directory import ReplicaReport
from hycluster.engine.fairness import payer_headers
from hycluster.engine.migrated import migrate
from hycluster.engine.protocol import EngineInfo
from hycluster.errors import InvalidInput, Unavailable
from hycluster.gateway.bulk import EngineRoom
from hycluster.gateway.columns import pool_columns
from hycluster.gateway.control_calls import ControlCalls
from hycluster.gateway.failover import Failover, Tell
from hycluster.gateway.flight import Flight
from hycluster.gateway.link import Link
from hycluster.gateway.members import Members
from hycluster.gateway.prefixes import Prefix, Prefixes
from hycluster.gateway.router import ByBlocks, Candidate, Policy, RouteRequest, most_spare, outstanding_tokens
from hycluster.observe.gateways import KnownReplica, ReplicaBooks
from hycluster.timeline import Track, current


class PoolClient(ControlCalls):
    """Stands where ``AsyncLLM`` expects its engine-core client. Lives on one event loop.

    Args:
        wait_s: how long a request whose replica was lost waits for another one.
        cold_start_wait_s: how long a new request waits for a replica where there is none; None: it is refused.
        failover: keep each request's tokens, so that it can go on elsewhere; without, one that has begun ends.
        prefixes: what is known of replicas' KV caches; None: nothing, and they are not asked.
        expected_output_tokens: of a request, if it allows more.
        on_lost: told of each request that ends because its replica was lost: Unavailable, ReplicaLost, KillsReplicas;
            or because its engine knows what is wrong with it: InvalidInput.

    Attributes:
        gateway_id: random; tells this gateway's load from that of others.
        migrated: what the loss of replicas has cost.
        first_replica: set once there has been a replica to send to.
        resources: what ``AsyncLLM`` reads of its client's state; a pool as such never dies.
        shows_pool: of all ingress processes, this one shows the metrics that concern the pool.
        jobs: by gateway, what each of its jobs has and wants, as the directory last said.
    """

    def __init__(
        self,
        model: str,
        policy: Policy,
        gateway_id: str,
        *,
        wait_s: float,
        cold_start_wait_s: float | None = None,
        failover: bool = True,
        prefixes: Prefixes | None = None,
        expected_output_tokens: int = 512,
        on_lost: Tell,
    ) -> None:
        self.model = model
        self.gateway_id = gateway_id
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = [0]
        self._keep = failover
        self._cold_start_wait_s = cold_start_wait_s
        self._policy = policy
        self._expected_output_tokens = expected_output_tokens
        self._encoder = MsgpackEncoder()
        self._arrived: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._failover = Failover(self._send, on_lost, wait_s=wait_s)
        self.prefixes = prefixes
        self._members = Members(self._failover, self._arrived, self.prefixes, gateway_id)
        self.shows_pool = False
        self.jobs: dict[str, dict[str, BulkDemand]] = {}
        self.migrated = self._failover.migrated
        self.first_replica = self._members.first

    async def update(self, reports: Iterable[ReplicaReport]) -> None:
        """Connect to replicas that are new, take the loads of those that are known."""
        await self._members.update(reports)

    async def rejoin(self, reports: Iterable[ReplicaReport]) -> None:
        """Connect again to replicas that were here by these reports, which are old, and are not here now."""
        await self._members.join(reports)

    async def close(self) -> None:
        """Say goodbye to every replica; what is still in flight there is dropped."""
        await self._members.leave()
        await self._failover.close()
        await self._members.close()

    def shutdown(self, timeout: float | None = None) -> None:
        """``AsyncLLM`` calls this from ``__del__``; :meth:`close` is the way."""

    # -- how it is ----------------------------------------------------------------------------------

    @property
    def able(self) -> bool:
        """A request would find a replica now."""
        return any(link.accepting for link in self._members.links.values())

    @property
    def links(self) -> int:
        """Replicas connected and taking requests."""
        return sum(link.accepting for link in self._members.links.values())

    @property
    def expert_loads(self) -> dict[str, ExpertLoad]:
        """By replica id, how its experts are loaded, where it says so."""
        loads = {replica_id: link.load for replica_id, link in self._members.links.items()}
        return {replica_id: load.experts for replica_id, load in loads.items() if load and load.experts}

    @property
    def colocation_loads(self) -> dict[str, ColocationLoad]:
        """By replica id, how online and bulk work share its steps, where it says so."""
        loads = {replica_id: link.load for replica_id, link in self._members.links.items()}
        return {replica_id: load.colocation for replica_id, load in loads.items() if load and load.colocation}

    @property
    def gone_loads(self) -> dict[str, ReplicaLoad]:
        """By replica id, what those that are gone had reported: what they had counted stays to be scraped."""
        return {known.replica_id: known.last for known in self._members.known.values() if known.gone and known.last}

    @property
    def engine_samples(self) -> dict[str, tuple[EngineSample, ...]]:
        """By replica id, vLLM's own metrics of its scheduler; of one that is gone what it had counted."""
        counted = {
            replica_id: tuple(sample for sample in load.samples if sample[0].endswith("_total"))
            for replica_id, load in self.gone_loads.items()
        }
        here = {replica_id: link.load.samples for replica_id, link in self._members.links.items() if link.load}
        return counted | here

    @property
    def known(self) -> Collection[KnownReplica]:
        """Replicas that are connected, and the last ones that were."""
        return list(self._members.known.values())

    @property
    def replicas_lost(self) -> int:
        """Connections that ended while their replicas took requests."""
        return self._members.lost

    @property
    def books(self) -> list[ReplicaBooks]:
        """Of the replicas that are connected."""
        return [link.books for link in self._members.links.values()]

    @property
    def rooms(self) -> list[EngineRoom]:
        """Of the replicas that take requests and have reported, how many rows of bulk each can use."""
        return [link.room for link in self._members.links.values() if link.accepting and link.load is not None]

    @property
    def progress_s(self) -> float:
        """On the monotonic clock, when the last tokens came; minus infinity before any."""
        return max((link.progress_s for link in self._members.links.values()), default=-math.inf)

    @property
    def infos(self) -> list[EngineInfo]:
        return [link.info for link in self._members.links.values()]

    @property
    def outstanding(self) -> dict[str, int]:
        """By replica id, the tokens that this gateway has to prefill or decode there."""
        return {replica_id: link.outstanding_tokens for replica_id, link in self._members.links.items()}

    @property
    def work(self) -> dict[str, GatewayWork] | None:
        """By replica id, what that has of this gateway's requests; None where no gateway goes by it."""
        if self.prefixes is None:
            return None
        return {replica_id: link.work.told for replica_id, link in self._members.links.items()}

    @property
    def outstanding_tokens(self) -> int:
        """On all replicas, and of requests that wait for one."""
        tokens = sum(self.outstanding.values())
        if self.requests_waiting:
            flights = self._failover.flights.values()
            tokens += sum(flight.tokens_to_compute for flight in flights if not flight.replica_id)
        return tokens

    @property
    def online_outstanding_tokens(self) -> int:
        """The same without batch work's."""
        return sum(
            flight.tokens_left if flight.replica_id else flight.tokens_to_compute
            for flight in self._failover.flights.values()
            if not flight.bulk
        )

    def count_bulk(self, request_ids: Iterable[str]) -> int:
        """How many of these, of which all are here, are batch work."""
        flights = self._failover.flights
        return sum(request_id in flights and flights[request_id].bulk for request_id in request_ids)

    @property
    def worked_off_tokens(self) -> int:
        """How much less is outstanding for what replicas did, or because requests ended; only grows."""
        return self._members.worked_off_tokens

    @property
    def requests_in_flight(self) -> int:
        return len(self._failover.flights)

    @property
    def requests_waiting(self) -> int:
        """Those that no replica has."""
        return self.requests_in_flight - sum(len(link.flights) for link in self._members.links.values())

    def expected_tokens(self, output_tokens: int) -> int:
        """Of all requests, sent or waiting, what is likely to be left to prefill or decode; see ``Flight``."""
        return sum(flight.expected_tokens(output_tokens) for flight in self._failover.flights.values())

    def dp_engines_running(self) -> bool:
        return bool(self._failover.flights)

    # -- requests and outputs -----------------------------------------------------------------------

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Send a request to the replica that the router chooses, or keep it until there is one. Returns at once.

        Raises:
            Unavailable: no replica can serve, and new requests don't wait.
            InvalidInput: the request holds what no message can.
        """
        track = self._begin_track(request)
        self._for_its_caller(request)
        flight = Flight(request, keep=self._keep, track=track)
        if track is not None:
            track.tokens_so_far = partial(getattr, flight, "output_tokens")
        try:
            await self._send(flight)
        except Unavailable:
            wait_s = self._cold_start_wait_s
            if wait_s is None:
                raise
            # Now, while there is somebody to tell.
            self._encoded(request)
            error = Unavailable(f"model: no replica of {self.model!r} could serve within {wait_s:g} s")
            if flight.track is not None:
                flight.track.note("waiting", reason="model start")
            self._failover.wait_for_first(flight, wait_s, error)

    def _for_its_caller(self, request: EngineCoreRequest) -> None:
        """Have the engine compute it for whoever calls."""
        try:
            request.cache_salt = own_salt(request.cache_salt)
        except UnicodeEncodeError:
            raise InvalidInput("cache_salt: is not allowed; must be text that UTF-8 can hold") from None
        if (caller := current_caller.get()) is not None:
            payer = payer_headers(caller.tenant, caller.weight)
            request.trace_headers = {**(request.trace_headers or {}), **payer}

    def _begin_track(self, request: EngineCoreRequest) -> Track | None:
        timeline = current.get()
        if timeline is None or timeline.ended_s is not None:
            return None
        if timeline.sampled:
            request.trace_headers = timeline.context.headers
        name = request.external_req_id or request.request_id
        tokens, bulk = len(request.prompt_token_ids or ()), request.priority >= Priority.BATCH
        return timeline.begin_track(name, self.model, tokens, bulk=bulk)

    async def _send(self, flight: Flight) -> None:
        if self.prefixes is not None:
            flight.prefix = self.prefixes.of(flight.request, flight.output)
        link = self._choose(flight)
        request = migrate(flight.request, flight.engine_id, flight.output) if flight.moves else flight.request
        message = self._encoded(request)
        self._failover.flights[flight.request_id] = flight
        if flight.track is not None:
            self._told_of_route(flight.track, flight, link)
        if self.prefixes is not None and flight.prefix is not None:
            self.prefixes.send(flight.prefix, link.replica_id)
        await link.send(flight, message)
        if self.prefixes is not None and flight.prefix is not None:
            self.prefixes.finish(flight.prefix, flight.request, flight.output)

    def _told_of_route(self, track: Track, flight: Flight, link: Link) -> None:
        scores = ((other.replica_id, self._score(other)) for other in self._members.links.values() if other.accepting)
        adapter = flight.request.lora_request.lora_name if flight.request.lora_request else None
        track.routed(link.replica_id, scores, len(flight.output), adapter)

    def _score(self, link: Link) -> int:
        seen = Candidate(replica_id=link.replica_id, own_tokens=link.outstanding_tokens, load=link.load)
        return outstanding_tokens(seen, self.gateway_id)

    def _choose(self, flight: Flight) -> Link:
        links = [link for link in self._members.links.values() if link.accepting]
        if flight.suspected:
            # Beside another one like it, the next death would not tell which of them replicas die of.
            links = [link for link in links if not link.has_suspect]
        if not links:
            raise self._no_replica()
        if len(links) == 1:
            return links[0]
        route = RouteRequest(
            tokens=flight.tokens_to_compute,
            prompt_tokens=flight.prompt_tokens + len(flight.output),
            output_tokens=min(self._expected_output_tokens, flight.tokens_to_compute - flight.prompt_tokens),
            prefix=flight.prefix.begin if flight.prefix is not None else None,
            session_id=flight.request.session_id,
            bulk=flight.bulk,
        )
        spare = [link.room.spare(link.bulk_rows) if flight.bulk else None for link in links]
        if flight.prefix is not None and isinstance(self._policy, ByBlocks):
            link = self._by_blocks(self._policy, flight.prefix, route, links, spare)
            if link is not None:
                return link
        candidates = [
            Candidate(
                replica_id=link.replica_id,
                own_tokens=link.outstanding_tokens,
                own_requests=len(link.flights),
                load=link.load,
                spare_rows=rows,
            )
            for link, rows in zip(links, spare, strict=True)
        ]
        return self._members.links[self._policy.choose(candidates, route)]

    def _by_blocks(
        self, policy: ByBlocks, prefix: Prefix, route: RouteRequest, links: list[Link], spare: list[int | None]
    ) -> Link | None:
        """None, if none of these has said what it holds."""
        assert self.prefixes is not None
        replica_ids = [link.replica_id for link in links]
        if (seen := self.prefixes.seen(prefix, replica_ids)) is None:
            return None
        cached, ages = seen
        if route.bulk:
            places = list(most_spare(spare, enough=1))
            links, replica_ids = [links[place] for place in places], [replica_ids[place] for place in places]
            cached, ages = cached[places], ages[places]
        columns = pool_columns(links, replica_ids, cached, ages, step_tokens=policy.step_tokens, bulk=route.bulk)
        return links[policy.place(columns, route)]

    def _no_replica(self) -> Unavailable:
        return Unavailable(f"model: no replica of {self.model!r} can serve now", retry_after_s=1.0)

    def _encoded(self, request: EngineCoreRequest) -> Any:
        try:
            return self._encoder.encode(request)
        except (UnicodeEncodeError, OverflowError, TypeError) as error:
            # Half of a surrogate pair, a number over 64 bits: JSON can say what no message can hold.
            raise InvalidInput(f"request: holds what can't be sent to an engine: {error}") from None

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        by_link: dict[Link, list[str]] = {}
        for request_id in request_ids:
            flight = self._failover.flights.get(request_id)
            if flight is None:
                continue
            if (link := self._members.links.get(flight.replica_id)) is not None:
                link.drop(flight)
                by_link.setdefault(link, []).append(flight.engine_id)
            if flight.track is not None:
                # By its caller, or by a stop string, which only the gateway sees.
                flight.track.output_tokens = flight.output_tokens
                flight.track.end("stopped")
            self._failover.landed(flight)
        for link, engine_ids in by_link.items():
            await link.abort(engine_ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._arrived.get()

    # -- control ------------------------------------------------------------------------------------

    async def call_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a control method on every replica."""
        links = list(self._members.links.values())
        if not links:
            raise self._no_replica()
        return await asyncio.gather(*(link.call(method, *arguments) for link in links))

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        for info in self.infos:
            return info.supported_tasks
        return ("generate",)

    def get_kv_event_sources(self) -> dict[int, Any]:
        return {}
