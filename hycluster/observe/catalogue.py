"""Every metric of our own: name, type, labels, meaning. ``docs/metrics.md`` is made from it.

Labels, on vLLM's metrics too: ``model`` by its name in the settings, ``replica`` by its id, ``ingress`` for the process
that counted. What concerns a pool and not one ingress process has no label ``ingress``: all of them know the same, and
the one that the directory names shows it, so that a sum over all that is scraped counts it once.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from typing import Literal

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

# The label ``ingress`` of this process: the host's name is the pod's. One that starts again is another one.
INGRESS = f"{socket.gethostname()}:{os.getpid()}"

POOL = ("model",)
REPLICA = ("model", "replica")
AT_INGRESS = ("model", "ingress")
REPLICA_AT_INGRESS = ("model", "replica", "ingress")

Kind = Literal["counter", "gauge", "histogram", "summary"]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric.

    Attributes:
        name: as a query has it.
    """

    name: str
    kind: Kind
    what: str
    labels: tuple[str, ...]

    def counter(self) -> CounterMetricFamily:
        """Without samples yet; so are the others."""
        return CounterMetricFamily(self.name.removesuffix("_total"), self.what, labels=self.labels)

    def gauge(self) -> GaugeMetricFamily:
        return GaugeMetricFamily(self.name, self.what, labels=self.labels)

    def histogram(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self.name, self.what, labels=self.labels)


CATALOGUE: dict[str, MetricSpec] = {}


def _family(kind: Kind, name: str, what: str, labels: tuple[str, ...]) -> MetricSpec:
    CATALOGUE[name] = MetricSpec(name, kind, what, labels)
    return CATALOGUE[name]


# -- what callers see ---------------------------------------------------------------------------------

HTTP_REQUESTS = _family(
    "counter", "http_requests_total",
    "Requests over HTTP that have ended; `model` is the one that they were for, empty where there is none of that name;"
    " `handler` is the route, `none` for a path that is none. `status` 499: the caller left before the answer began."
    " `/metrics` and `/health` are not counted.",
    ("model", "method", "handler", "status", "ingress"),
)  # fmt: skip
HTTP_SECONDS = _family(
    "histogram", "http_request_duration_seconds",
    "From a request's first byte to the last one of its answer, streams too.",
    ("model", "method", "handler", "ingress"),
)  # fmt: skip
HTTP_HIGH_RESOLUTION = _family(
    "histogram", "http_request_duration_highr_seconds", "The same of all routes together, in finer steps.", ("ingress",)
)
HTTP_REQUEST_BYTES = _family(
    "summary", "http_request_size_bytes", "Bodies of requests, as far as they were read.", ("handler", "ingress")
)
HTTP_RESPONSE_BYTES = _family("summary", "http_response_size_bytes", "Bodies of answers.", ("handler", "ingress"))
CERTIFICATE_EXPIRES = _family(
    "gauge",
    "hycluster_certificate_expires_timestamp_seconds",
    "When the certificate ends that both ingresses show their callers; 0 where they have none (`auth.tls`).",
    ("ingress",),
)
LEDGER_ENTRIES = _family(
    "counter", "hycluster_ledger_entries_total", "Lines of the usage ledger that this process has written.",
    ("ingress",),
)  # fmt: skip
LEDGER_LOST = _family(
    "counter", "hycluster_ledger_lost_entries_total",
    "Lines of the usage ledger that were given up: the disk took none, and too many waited for it.", ("ingress",),
)  # fmt: skip
LEDGER_LAG = _family(
    "gauge", "hycluster_ledger_lag_seconds",
    "Age of the oldest line of the usage ledger that is not committed to its store, of this process or of one of its"
    " machine that has ended; 0 if all are. Up to `ledger.cut_every_s` is as it should be.",
    ("ingress",),
)  # fmt: skip
PROJECT_REQUESTS = _family(
    "counter", "hycluster_project_requests_total",
    "Requests in the usage ledger by whose they are and how they ended: `finished`, `cancelled`, `failed`, `refused`."
    " Lines of batches are in the ledger alone. 100 projects have series of their own at a process, each until it has"
    " asked nothing for an hour and another one comes; others are `_other`. Tenant and project are empty where nobody"
    " is asked who he is.",
    ("tenant", "project", "outcome", "ingress"),
)  # fmt: skip
PROJECT_TOKENS = _family(
    "counter", "hycluster_project_tokens_total",
    "Tokens of the same requests: `input` were computed, `cached` are those of prompts that the KV cache had,"
    " `output` came.",
    ("tenant", "project", "kind", "ingress"),
)  # fmt: skip
PROJECT_COST = _family(
    "counter", "hycluster_project_cost_total",
    "What the same requests cost by the models' `price`, in `auth.currency`.",
    ("tenant", "project", "ingress"),
)  # fmt: skip
HTTP_RUNNING = _family("gauge", "http_requests_inprogress", "Requests over HTTP that are being answered.", ("ingress",))
GRPC_CALLS = _family(
    "counter", "grpc_server_handled_total",
    "Calls by gRPC that have ended, by their status; CANCELLED: the caller left, or its deadline was over.",
    ("model", "grpc_service", "grpc_method", "grpc_code", "ingress"),
)  # fmt: skip
GRPC_SECONDS = _family(
    "histogram", "grpc_server_handling_seconds",
    "From a call's start to its end, streams too.",
    ("model", "grpc_service", "grpc_method", "ingress"),
)  # fmt: skip
GRPC_RUNNING = _family("gauge", "grpc_server_calls_inprogress", "Calls by gRPC that are being answered.", ("ingress",))
REFUSED = _family(
    "counter", "hycluster_requests_refused_total",
    "Requests that no engine was given: `overloaded` (429, by a bound of `admission`), `unavailable` (503, no"
    " replica).",
    ("model", "reason", "priority", "ingress"),
)  # fmt: skip
FAILED = _family(
    "counter", "hycluster_requests_failed_total",
    "Requests that ended without an answer after they were taken: `ReplicaLost` (no place on another one in time),"
    " `KillsReplicas` (three replicas died of it), `RequestFailed` (an engine's error), `Unavailable` (the shutdown, a"
    " wait in vain).",
    ("model", "reason", "priority", "ingress"),
)  # fmt: skip
CANCELLED = _family(
    "counter", "hycluster_requests_cancelled_total",
    "Requests whose caller left, or whose deadline passed, before the answer was whole.",
    ("model", "priority", "ingress"),
)  # fmt: skip
LIMITED = _family(
    "counter", "hycluster_limits_refused_total",
    "Requests that were refused by a limit of their caller's own (429): which limit, and whether it is a key's, a"
    " project's or a tenant's. Those of batches come again.",
    ("limit", "of", "ingress"),
)  # fmt: skip

SPANS_LOST = _family(
    "counter", "hycluster_spans_lost_total",
    "Spans that no collector has: it took none, or was away while too many waited for it; where traces are exported.",
    ("ingress",),
)  # fmt: skip

# -- the pool -----------------------------------------------------------------------------------------

READY = _family("gauge", "hycluster_replicas_ready", "Replicas that take requests; a group counts as one.", POOL)
WANTED = _family(
    "gauge", "hycluster_replicas_wanted", "Replicas that there are to be, by the settings or the autoscaler.", POOL
)
FAILED_STARTS = _family(
    "gauge", "hycluster_replica_failed_starts", "Starts of replicas that have failed since one succeeded.", POOL
)
CONNECTED = _family(
    "gauge", "hycluster_replicas_connected", "Replicas (ranks of groups) that this ingress process reaches.", AT_INGRESS
)
LOST = _family(
    "counter", "hycluster_replicas_lost_total",
    "Connections to replicas that ended while these took requests: they died, hung, or went silent.",
    AT_INGRESS,
)  # fmt: skip
SILENT = _family(
    "gauge", "hycluster_replica_silent_seconds",
    "Time since a replica that has requests of this ingress process sent anything; 0 while it has none.",
    REPLICA_AT_INGRESS,
)  # fmt: skip

# -- routing ------------------------------------------------------------------------------------------

ROUTED = _family(
    "counter", "hycluster_requests_routed_total",
    "Requests sent to a replica; one that is migrated counts at each.",
    REPLICA_AT_INGRESS,
)  # fmt: skip
PREFIX_PREDICTIONS = _family(
    "counter", "hycluster_prefix_predictions_total",
    "Requests of which it was predicted how many tokens of the prompt their replica has in its KV cache, and whose"
    " engine has said how many it found. Nothing without `router.follow_kv_blocks`, or a `router.policy` that needs it;"
    " so are the other three.",
    AT_INGRESS,
)  # fmt: skip
PREFIX_CACHED = _family(
    "counter", "hycluster_prefix_cached_tokens_total", "Tokens that those engines found.", AT_INGRESS
)
PREFIX_ERROR = _family(
    "counter", "hycluster_prefix_error_tokens_total",
    "By how many tokens these predictions were wrong: `missing` were predicted and not found (evicted meanwhile, say),"
    " `unforeseen` were found and not predicted (stored meanwhile for another ingress process, say).",
    ("model", "kind", "ingress"),
)  # fmt: skip
PREFIX_BLOCKS = _family(
    "gauge", "hycluster_prefix_index_blocks", "KV blocks of replicas that the ingress process knows of.", AT_INGRESS
)
IN_FLIGHT = _family(
    "gauge", "hycluster_requests_in_flight", "Requests of this ingress process on a replica.", REPLICA_AT_INGRESS
)
OUTSTANDING = _family(
    "gauge", "hycluster_outstanding_tokens",
    "Tokens that a replica has yet to prefill or decode for this ingress process; what the router goes by.",
    REPLICA_AT_INGRESS,
)  # fmt: skip

# -- failover -----------------------------------------------------------------------------------------

MIGRATED = _family(
    "counter", "hycluster_requests_migrated_total",
    "Requests migrated to another replica after theirs was lost; one that moves twice counts twice.",
    AT_INGRESS,
)  # fmt: skip
RECOMPUTED = _family(
    "counter", "hycluster_tokens_recomputed_total",
    "Prompt and output tokens that the lost replica had computed and the next one has to prefill again, unless its"
    " prefix cache has them.",
    AT_INGRESS,
)  # fmt: skip
PAUSES = _family(
    "histogram", "hycluster_migration_pause_seconds",
    "Stall of a migrated request: from the lost replica's last message to the next one's first token.",
    AT_INGRESS,
)  # fmt: skip

# -- co-location and batch ----------------------------------------------------------------------------

PARKED = _family(
    "gauge", "hycluster_batch_rows_parked",
    "Running batch requests that got no token in the last step, because online requests needed it.",
    REPLICA,
)  # fmt: skip
PREEMPTED = _family(
    "counter", "hycluster_batch_rows_preempted_total",
    "Batch requests that lost their slot and KV blocks to an online request, and are computed again.",
    REPLICA,
)  # fmt: skip
ENGINE_TOKENS = _family(
    "counter", "hycluster_engine_tokens_total",
    "Prompt and output tokens computed, `online` and `batch`.",
    (*REPLICA, "priority"),
)  # fmt: skip
STEP_SECONDS = _family(
    "gauge", "hycluster_engine_step_seconds",
    "Duration of the last step, `measured` and `predicted`.",
    (*REPLICA, "kind"),
)  # fmt: skip
STEP_COEFFICIENTS = _family(
    "gauge", "hycluster_engine_step_coefficient_seconds",
    "What a step takes, as learned: base, and for each token of prefill, sequence and token of KV cache read.",
    (*REPLICA, "term"),
)  # fmt: skip
JOB_ROWS = _family(
    "gauge", "hycluster_job_rows_in_flight",
    "Rows of a batch job, or of an OpenAI batch, that have a place in the engines; gone when the job has none and wants"
    " none.",
    (*POOL, "batch_job"),
)  # fmt: skip
JOB_DEADLINE = _family(
    "gauge", "hycluster_job_late_deadline_timestamp_seconds",
    "The end of the window that a batch will miss at its pace; only while that is so.",
    (*POOL, "batch_job"),
)  # fmt: skip

# -- scaling ------------------------------------------------------------------------------------------

TARGET = _family("gauge", "hycluster_replicas_target", "Replicas that the autoscaler wants.", POOL)
RUNNING = _family("gauge", "hycluster_replicas_running", "Replicas that have started, as the autoscaler sees it.", POOL)
COLD_START = _family("gauge", "hycluster_cold_start_seconds", "Duration of the latest replica start.", POOL)
DECISIONS = _family(
    "counter", "hycluster_scaling_decisions_total",
    "Changes of the number of replicas wanted, by cause: wake, tokens, kv_cache, queue, quiet, idle, bounds.",
    (*POOL, "cause"),
)  # fmt: skip
WAITING = _family(
    "gauge", "hycluster_requests_without_replica",
    "Requests that wait at an ingress process because no replica is running.",
    AT_INGRESS,
)  # fmt: skip

# -- experts ------------------------------------------------------------------------------------------

EXPERT_TOKENS = _family(
    "counter", "hycluster_expert_tokens_total",
    "Tokens routed to an expert, summed over layers; a token counts once for each expert it is routed to.",
    (*REPLICA, "expert"),
)  # fmt: skip
EXPERT_MOVED = _family(
    "counter", "hycluster_expert_moved_tokens_total",
    "Tokens that random compensation (`routing.recycle`) moved from an expert over its capacity to another.",
    REPLICA,
)  # fmt: skip
EXPERT_MOVED_RATIO = _family(
    "gauge", "hycluster_expert_moved_ratio", "Fraction of routed tokens that random compensation moved.", REPLICA
)
EXPERT_SKEW = _family(
    "gauge", "hycluster_expert_load_skew_ratio",
    "Tokens of the busiest expert divided by the mean over experts, in recent steps; 1 is balanced.",
    REPLICA,
)  # fmt: skip
EXPERT_RANK_SKEW = _family(
    "gauge", "hycluster_expert_rank_load_skew_ratio",
    "Tokens of the busiest expert-parallel rank divided by the ranks' mean, in recent steps; 1 is balanced.",
    REPLICA,
)  # fmt: skip

HEAD = """# Metrics

Made by `hycluster metrics reference` from the code; a test compares. What is scraped where, labels, vLLM's own metrics
and what a query has to know is in [monitoring.md](monitoring.md).

Without the label `ingress`, a series is shown by one ingress process of the service, with it by each for itself.

| metric | type | labels | what |
|---|---|---|---|
"""


def metrics_page() -> str:
    """``docs/metrics.md``."""
    return HEAD + "".join(
        f"| `{family.name}` | {family.kind} | {', '.join(f'`{label}`' for label in family.labels)} | {family.what} |\n"
        for family in CATALOGUE.values()
    )


def names_in(query: str) -> set[str]:
    """Metrics that a PromQL expression or a page names, of ours and of vLLM's."""
    return set(re.findall(r"\b(?:hycluster_|vllm:|http_|grpc_server_)\w+", query))
