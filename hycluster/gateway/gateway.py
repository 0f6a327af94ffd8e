"""The gateway: one model's pool as a vLLM ``EngineClient``.

It is vLLM's own ``AsyncLLM`` around a client that reaches the whole pool (``hycluster/gateway/pool.py``), so
tokenizing, detokenizing, stop strings, logprobs and ``n`` > 1 are vLLM's code, and all text state lives
here: the death of a replica loses none of it. It holds the model's config and tokenizer, no weights.

Pinned to vLLM 0.32.0: ``__init__`` sets what ``AsyncLLM.__init__`` sets, without starting an engine core;
``tests/integration/test_vllm_contract.py`` compares the two.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Container, Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import ray
from ray.actor import ActorHandle
from vllm.config import VllmConfig
from vllm.pooling_params import PoolingParams
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.transformers_utils.config import maybe_register_config_serialize_by_value
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import RequestOutputCollector

from hycluster.auth.caller import Caller, current_caller
from hycluster.core import Priority
from hycluster.directory.directory import FORGET_AFTER_S, REPORT_EVERY_S, Demand, PoolView
from hycluster.errors import HyclusterError, InvalidInput, Overloaded, Unauthenticated, Unavailable, kind_name
from hycluster.gateway.adapters import PoolAdapters
from hycluster.gateway.admission import Gate
from hycluster.gateway.api_arguments import model_arguments
from hycluster.gateway.asking import answer_questions
from hycluster.gateway.bulk import BulkLanes
from hycluster.gateway.captured import capture
from hycluster.gateway.checked import CheckedInputs, CheckedLLM, priority_of
from hycluster.gateway.coldstart import ColdStart
from hycluster.gateway.counted import CountingOutputs
from hycluster.gateway.grammars import GrammarCheck
from hycluster.gateway.places import current_places
from hycluster.gateway.pool import PoolClient
from hycluster.gateway.pool_errors import LOST, PoolInvalidInput, PoolOverloaded, PoolUnavailable
from hycluster.gateway.prefixes import Prefixes
from hycluster.gateway.router import BY_BLOCKS, make_policy
from hycluster.gateway.tiers import is_bulk_now
from hycluster.ledger.account import account_now
from hycluster.observe.colocation import colocation_metrics
from hycluster.observe.experts import expert_metrics
from hycluster.observe.failover import failover_metrics
from hycluster.observe.gateways import gateway_metrics
from hycluster.observe.prefixes import prefix_metrics
from hycluster.observe.scaling import scaling_metrics
from hycluster.observe.vllm_requests import ModelStats, vllm_metrics
from hycluster.pool_health import PoolHealth
from hycluster.replica.sparing_log import SparingLog
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.timeline import current
from hycluster.traffic import GatewayTraffic, TrafficMeter

logger = logging.getLogger(__name__)

# A replica that died is named by the directory for a while, and nobody reaches it.
CUT_OFF_AFTER_S = FORGET_AFTER_S + 5.0


class Gateway(CheckedLLM):
    """A vLLM engine client whose engine is every replica of one model.

    Build it with :func:`hycluster.gateway.opening.open_gateway`.

    Args:
        patient: a request that finds no replica waits for one, if one can be started for it, whatever the settings say.

    Raises:
        SettingsError: there is no such parser or template as the model's ``api`` names.

    Attributes:
        api: what vLLM's API is told of the model.
        cold_start: who comes while there is no replica.
        bulk: the places in the engines that jobs of this process have.
        traffic: what callers got here; of answers, only with ``metrics``.
        adapters: of this model.
        lora_requests: theirs; see :class:`PoolAdapters`.
        directory: that it follows; None before it has begun to.
    """

    def __init__(
        self,
        model: Model,
        config: VllmConfig,
        router: Router,
        admission: Admission,
        *,
        metrics: bool,
        patient: bool = False,
    ) -> None:
        maybe_register_config_serialize_by_value()
        self.model = model
        self.api = model_arguments(model, config)
        self.cold_start = ColdStart(model, patient=patient)
        self.admission = admission
        self.traffic = GatewayTraffic()
        self._gate = Gate(model.name, admission, left=self.traffic.online.cancel)
        self.directory: ActorHandle[Any] | None = None
        self._view: PoolView | None = None
        # Since when no replica can be reached from here though the directory names some.
        self._cut_off_since_s: float | None = None
        self._learned = False
        self._unanswered = SparingLog(logger, logging.WARNING)
        self.vllm_config = config
        self.model_config = config.model_config
        self.scheduler_config = config.scheduler_config
        self.observability_config = config.observability_config
        self.renderer = renderer_from_config(config)
        self.input_processor = CheckedInputs(config, self.renderer)
        # None is how vLLM says that there is nothing to validate: ``CheckedLLM`` does it.
        self.input_processor.structured_outputs_config = None  # type: ignore[assignment]
        self.grammars = GrammarCheck(admission, self._tokenizer_file)
        self.admission_stats = None
        self.log_requests = False
        self.log_stats = metrics
        self.output_processor = CountingOutputs(
            model.name,
            self.renderer.tokenizer,
            log_stats=self.log_stats,
            stream_interval=config.scheduler_config.stream_interval,
            tracing_enabled=False,
        )
        gateway_id = secrets.token_hex(8)
        self.bulk = BulkLanes(gateway_id)
        self.engine_core = PoolClient(
            model.name,
            make_policy(
                router.policy,
                gateway_id,
                session_slack_tokens=router.session_slack_tokens,
                step_tokens=config.scheduler_config.max_num_batched_tokens,
            ),
            gateway_id,
            wait_s=router.failover_wait_s,
            cold_start_wait_s=self.cold_start.wait_s,
            failover=router.failover,
            prefixes=Prefixes(longest_prompt_tokens=config.model_config.max_model_len)
            if router.follow_kv_blocks or router.policy in BY_BLOCKS
            else None,
            expected_output_tokens=model.autoscaling.expected_output_tokens,
            on_lost=self._request_lost,
        )
        self.adapters = PoolAdapters(model, self.engine_core, takes=config.lora_config is not None, say=self._say_now)
        self.lora_requests = self.adapters.requests
        self._callers: WeakKeyDictionary[RequestOutputCollector, Caller] = WeakKeyDictionary()
        self._bulk: WeakSet[RequestOutputCollector] = WeakSet()
        self.logger_manager = None
        if metrics:
            # Where it is asked for, it is all that ``AsyncLLM`` calls of its own.
            self.logger_manager = stats = ModelStats(config, self.engine_core, self.traffic)  # type: ignore[assignment]
            vllm_metrics.watch(model.name, stats)
            gateway_metrics.watch(model.name, self)
            expert_metrics.watch(model.name, self.engine_core)
            colocation_metrics.watch(model.name, self.engine_core)
            failover_metrics.watch(model.name, self.engine_core)
            if self.engine_core.prefixes is not None:
                prefix_metrics.watch(model.name, self.engine_core.prefixes)
            if model.replicas.vary:
                scaling_metrics.watch(model.name, self)
        self._client_count = 1
        self.output_handler = None
        self.profiler = None
        self._frontend_profiler_injected = False
        self._profile_lock = asyncio.Lock()
        self._profile_session_guard_enabled = True
        self._profile_session_active = False
        self._elastic_ep_lock = asyncio.Lock()

    # -- admission and health -----------------------------------------------------------------------

    def check_admission(self, n: int = 1, request_id: str | None = None, *, bulk: bool | None = None) -> None:
        """Refuse a request before any work is done for it.

        Args:
            n: sequences.
            request_id: of one that is being sent to the engines; None: an answer is about to begin.
            bulk: it is counted as batch work; None: as far as can be told now.

        Raises:
            PoolOverloaded: a bound of the settings' ``admission`` is reached.
            PoolUnavailable: no replica can serve, and the request is not to wait for one.
            PoolInvalidInput: more sequences than are ever admitted.
        """
        if (timeline := current.get()) is not None:
            # Who is refused has asked for it too.
            timeline.model = timeline.model or self.model.name
        places, gate = current_places.get(), self._gate
        if request_id is not None and places is not None and places.take(gate, n):
            # It was let in before its answer began.
            return
        if request_id is None and places is not None and places.of(gate) >= n:
            return
        try:
            self._let_in(n, self.traffic.of(bulk=is_bulk_now() if bulk is None else bulk))
        except HyclusterError as error:
            if places is not None:
                places.refusal = error
            raise
        if request_id is None and places is not None:
            places.hold(gate, n)
        if timeline is not None:
            timeline.admitted()
        if (account := account_now.get()) is not None:
            account.admit(self.model.name)

    def _let_in(self, n: int, traffic: TrafficMeter) -> None:
        pool = self.engine_core
        if not pool.able and self.cold_start.wait_s is None:
            traffic.refuse("unavailable")
            raise self.refusal()
        try:
            self._gate.check(
                n,
                # Jobs' rows have bounds of their own, and must not shut out who waits for an answer.
                in_flight=max(0, pool.requests_in_flight - self.bulk.held),
                outstanding_tokens=pool.online_outstanding_tokens if self.bulk.held else pool.outstanding_tokens,
                worked_off_tokens=pool.worked_off_tokens,
            )
        except Overloaded as shed:
            traffic.refuse("overloaded")
            raise PoolOverloaded(shed.message, shed.retry_after_s) from None
        except InvalidInput as error:
            raise PoolInvalidInput(error.message) from None

    async def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams | PoolingParams, *rest: Any, **named: Any
    ) -> RequestOutputCollector:
        """Begin a request that has been admitted; see :class:`CheckedLLM` for what it raises."""
        collector = await super().add_request(request_id, prompt, params, *rest, **named)
        if (caller := current_caller.get()) is not None:
            self._callers[collector] = caller
        if priority_of(prompt, named.get("priority", 0)) >= Priority.BATCH:
            self._bulk.add(collector)
        capture(prompt, collector, self.renderer.tokenizer)
        return collector

    @property
    def able(self) -> bool:
        """A request would find a replica, or have one started."""
        return self.engine_core.able or self.cold_start.wakes

    @property
    def health(self) -> PoolHealth:
        """How many replicas take requests from here. A group counts once one of its ranks does."""
        scaling = self.cold_start.scaling
        return PoolHealth(
            math.ceil(self.engine_core.links / self.model.parallel.data),
            scaling.target if scaling else self.model.replicas.count,
            self.cold_start.wakes,
            self.cold_start.trouble,
            self.cut_off,
            self._lost,
        )

    @property
    def _lost(self) -> frozenset[str]:
        """Replicas that have been here and are not, and that the directory names."""
        known = self.engine_core.known
        here = {replica.replica_id for replica in known if not replica.gone}
        gone = {replica.replica_id for replica in known if replica.gone} - here
        named = () if self._view is None else self._view.replicas
        return frozenset(report.address.replica_id for report in named if report.accepting) & gone

    @property
    def _losses(self) -> dict[str, str]:
        """By replica, how it was lost here; of those that the directory still names."""
        named = set() if self._view is None else {report.address.replica_id for report in self._view.replicas}
        lost = {known.replica_id: known.why for known in self.engine_core.known if known.gone}
        here = {known.replica_id for known in self.engine_core.known if not known.gone}
        return {replica: why for replica, why in lost.items() if replica in named - here and why}

    @property
    def can_open(self) -> bool:
        """There is, or was, a replica; or the pool is known to sleep."""
        # Of what does not generate only its engine knows what it can do, and the ingress' routes follow from that.
        sleeps = self.cold_start.asleep.is_set() and self.model_config.runner_type == "generate"
        return self.engine_core.first_replica.is_set() or sleeps

    @property
    def settled(self) -> bool:
        """What the directory knows of the pool is known here, and its replicas are connected."""
        return self._view is not None and (self.can_open or not self._named)

    @property
    def _named(self) -> bool:
        """The directory names a replica that takes requests."""
        return self._view is not None and any(report.accepting for report in self._view.replicas)

    @property
    def cut_off(self) -> bool:
        """Others may reach replicas of this pool; here none has been reached for a while."""
        since_s = self._cut_off_since_s
        return since_s is not None and time.monotonic() - since_s > CUT_OFF_AFTER_S

    async def check_health(self) -> None:
        """Raise PoolUnavailable unless a request would find a replica, or have one started."""
        if not self.able:
            raise self.refusal()

    def refusal(self) -> PoolUnavailable:
        """What a caller hears that finds no replica, and for whom none is started."""
        error = self.cold_start.refusal()
        return PoolUnavailable(error.message, error.retry_after_s)

    async def _request_lost(self, request_id: str, error: HyclusterError) -> None:
        state = self.output_processor.request_states.get(request_id)
        if state is not None and state.queue is not None:
            traffic = self.traffic.of(bulk=state.queue in self._bulk)
            if isinstance(error, Unauthenticated):
                traffic.cancel()
            elif not isinstance(error, InvalidInput):
                traffic.fail(kind_name(error))
            lost = LOST[type(error)](error.message)
            lost.retry_after_s = error.retry_after_s or lost.retry_after_s
            state.queue.put(lost)
            # With n > 1 its siblings may be on replicas that live; nobody waits for them any more.
            asked = state.parent_req.request_id if state.parent_req else request_id
            await self.engine_core.abort_requests_async(self.output_processor.abort_requests([asked], internal=True))

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """Drop requests whose caller has left. Those that were lost, or have their answer, are not here any more."""
        asked = (request_id,) if isinstance(request_id, str) else tuple(request_id)
        left = self.output_processor.abort_requests(asked, internal)
        bulk = self.engine_core.count_bulk(left)
        self.traffic.online.cancel(len(left) - bulk)
        self.traffic.batch.cancel(bulk)
        await self.engine_core.abort_requests_async(left)

    async def end_requests(self, error: HyclusterError, of: Container[Caller] | None = None) -> None:
        """End what is in flight for these callers with an error, whatever it waits for; None: all that is."""
        for request_id, state in list(self.output_processor.request_states.items()):
            if of is None or (state.queue is not None and self._callers.get(state.queue) in of):
                await self._request_lost(request_id, error)

    @property
    def callers(self) -> set[Caller]:
        """For whom something is in flight."""
        queues = [state.queue for state in self.output_processor.request_states.values() if state.queue is not None]
        return {self._callers[queue] for queue in queues if queue in self._callers}

    async def _add_request(self, request: EngineCoreRequest, *rest: Any) -> None:
        try:
            await super()._add_request(request, *rest)
        except Unavailable:
            # The last replica has gone since this request was admitted.
            self.output_processor.abort_requests([request.request_id], internal=True)
            self.traffic.of(bulk=request.priority >= Priority.BATCH).refuse("unavailable")
            raise self.refusal() from None
        except InvalidInput:
            self.output_processor.abort_requests([request.request_id], internal=True)
            raise

    # -- the pool -----------------------------------------------------------------------------------

    async def follow(self, directory: ActorHandle[Any]) -> None:
        """Keep the pool's members, loads and adapters as the directory says; runs until cancelled."""
        self.directory = directory
        while True:
            try:
                view = await self._next_word(directory)
                await self.engine_core.update(view.replicas)
                self.engine_core.shows_pool = view.shown_by == self.engine_core.gateway_id
                self.engine_core.jobs = view.bulk
                self.bulk.hear(self.engine_core.rooms, view.bulk, self.engine_core.progress_s)
                self._look_around()
                if not self._learned and self.engine_core.infos:
                    self.learn()
            except Exception:
                # The directory may be starting again; the pool stays as it is meanwhile.
                self._unanswered.write("the directory does not answer", exc_info=True)
            await asyncio.sleep(REPORT_EVERY_S)

    async def _next_word(self, directory: ActorHandle[Any]) -> PoolView:
        """What the directory says; while it says nothing, replicas that are lost here are reached by its last word.

        A connection may break though both ends live, and the directory be away as long as a head takes to come back.
        """
        asking = asyncio.ensure_future(self._sync(directory))
        try:
            while not asking.done():
                await asyncio.wait({asking}, timeout=REPORT_EVERY_S)
                if self._view is not None and (not asking.done() or asking.exception()):
                    await self.engine_core.rejoin(self._view.replicas)
            return asking.result()
        finally:
            asking.cancel()

    async def _sync(self, directory: ActorHandle[Any]) -> PoolView:
        # Of an actor on a machine that is gone without a word Ray says nothing for minutes; one that has started again
        # elsewhere answers the next call.
        async with asyncio.timeout(FORGET_AFTER_S):
            view: PoolView = await directory.sync.remote(
                self.model.name,
                self.engine_core.gateway_id,
                self.engine_core.outstanding,
                self.adapters.words,
                self._demand() if self.model.replicas.vary else None,
                self.bulk.demands,
                self.log_stats,
                self.engine_core.work,
                self._losses,
            )
        self.adapters.take_over(view.adapters)
        self.cold_start.hear(view.scaling, view.trouble)
        self._view = view
        answer_questions(directory, view.questions)
        return view

    async def _say_now(self) -> None:
        if self.directory is not None:
            # If the directory is away now, the next sync tells it.
            with contextlib.suppress(ray.exceptions.RayError):
                await self._sync(self.directory)

    def _look_around(self) -> None:
        if self.engine_core.able or not self._named:
            self._cut_off_since_s = None
        elif self._cut_off_since_s is None:
            self._cut_off_since_s = time.monotonic()

    def _demand(self) -> Demand:
        pool = self.engine_core
        return Demand(
            self.model,
            waiting_requests=pool.requests_waiting + self.cold_start.awaited,
            outstanding_tokens=pool.expected_tokens(self.model.autoscaling.expected_output_tokens),
            cold_start_s=self.cold_start.last_start_s,
        )

    def learn(self) -> None:
        """Take over what only a started engine knows, as ``AsyncLLM`` does from its own."""
        self._learned = True
        self.cold_start.want_no_more()
        for info in self.engine_core.infos:
            self.model_config.max_model_len = min(self.model_config.max_model_len, info.max_model_len)
            self.vllm_config.cache_config.block_size = info.block_size
            self.vllm_config.cache_config.num_gpu_blocks = info.kv_tokens // info.block_size
