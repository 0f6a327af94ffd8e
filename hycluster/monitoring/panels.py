"""What the dashboards show: a title, a unit and a few queries a panel. How they look is in :mod:`.dashboards`.

Queries are of metrics that are there (``docs/metrics.md``, and vLLM's own): a test asks a Prometheus that scrapes a
real cluster each of them. Sums run over all ingress processes; what concerns a pool has one series of each kind,
whoever shows it, and ``max`` bridges the moment in which another one takes that over.
"""

from __future__ import annotations

from dataclasses import dataclass

RATE = "[$__rate_interval]"
OF_MODEL = '{model=~"$model"}'
ONLINE, BATCH_WORK = 'priority="online"', 'priority="batch"'


@dataclass(frozen=True, slots=True)
class Query:
    """One of a panel's: what it says, and what its series are called."""

    promql: str
    legend: str = "{{model}}"


@dataclass(frozen=True, slots=True)
class PanelSpec:
    """A picture over time.

    Attributes:
        what: what one sees in it, and what it means.
        unit: Grafana's name of it.
    """

    title: str
    what: str
    unit: str
    queries: tuple[Query, ...]


@dataclass(frozen=True, slots=True)
class DashboardSpec:
    """One page of panels.

    Attributes:
        chosen_by: the label that whoever looks chooses by, and a metric that has all of its values.
    """

    name: str
    title: str
    what: str
    panels: tuple[PanelSpec, ...]
    chosen_by: tuple[str, str] = ("model", "hycluster_replicas_wanted")


def rate(metric: str, by: str = "model", labels: str = "") -> str:
    """Events a second of a counter, added up."""
    chosen = f'{{model=~"$model"{", " + labels if labels else ""}}}'
    return f"sum by ({by}) (rate({metric}{chosen}{RATE}))"


def of_projects(what: str, by: str = "tenant, project", labels: str = "") -> str:
    """A second, of what projects have had."""
    chosen = f'{{tenant=~"$tenant"{", " + labels if labels else ""}}}'
    return f"sum by ({by}) (rate(hycluster_project_{what}_total{chosen}{RATE}))"


def quantile_of(share: float, histogram: str) -> str:
    """Of all that a histogram observed lately of online requests: nobody waits for rows of batch work."""
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', 'model, le', ONLINE)})"


def latest(metric: str, by: str = "model") -> str:
    """A gauge that one process shows."""
    return f"max by ({by}) ({metric}{OF_MODEL})"


def total(metric: str, by: str = "model") -> str:
    """A gauge that each process has a part of."""
    return f"sum by ({by}) ({metric}{OF_MODEL})"


def _quantiles(histogram: str) -> tuple[Query, ...]:
    return tuple(Query(quantile_of(share, histogram), f"{{{{model}}}} p{share * 100:g}") for share in (0.5, 0.95, 0.99))


def _hit_ratio(by: str = "model") -> str:
    return f"{rate('vllm:prefix_cache_hits_total', by)} / {rate('vllm:prefix_cache_queries_total', by)}"


REPLICA = "{{model}} {{replica}}"
OWNER = "{{tenant}}/{{project}}"

SERVING = DashboardSpec(
    "serving",
    "hycluster / Serving",
    "What callers ask and get.",
    (
        PanelSpec(
            "Requests by end", "Sequences of online requests that engines have finished, by why.", "reqps",
            (Query(rate("vllm:request_success_total", "model, finished_reason", ONLINE),
                   "{{model}} {{finished_reason}}"),),
        ),
        PanelSpec(
            "Refused, failed, left",
            "Online requests: refused before any work was done, lost on the way, or left by their callers.",
            "reqps",
            (
                Query(
                    rate("hycluster_requests_refused_total", "model, reason", ONLINE), "{{model}} refused: {{reason}}"
                ),
                Query(rate("hycluster_requests_failed_total", "model, reason", ONLINE), "{{model}} failed: {{reason}}"),
                Query(rate("hycluster_requests_cancelled_total", labels=ONLINE), "{{model}} left"),
            ),
        ),
        PanelSpec(
            "HTTP by route and status", "All that came by HTTP, models' or not.", "reqps",
            (Query(f"sum by (handler, status) (rate(http_requests_total{RATE}))", "{{handler}} {{status}}"),),
        ),
        PanelSpec(
            "gRPC by method and status", "All that came by gRPC.", "reqps",
            (Query(f"sum by (grpc_method, grpc_code) (rate(grpc_server_handled_total{RATE}))",
                   "{{grpc_method}} {{grpc_code}}"),),
        ),
        PanelSpec(
            "Time to first token", "From an online request's arrival to its first token.", "s",
            _quantiles("vllm:time_to_first_token_seconds"),
        ),
        PanelSpec(
            "Time between tokens", "Of online requests that run.", "s", _quantiles("vllm:inter_token_latency_seconds"),
        ),
        PanelSpec(
            "Whole requests", "Online ones, from arrival to the last token.", "s",
            _quantiles("vllm:e2e_request_latency_seconds"),
        ),
        PanelSpec(
            "Tokens", "Prompts that came in, and output, for whom.", "tokens/s",
            (
                Query(rate("vllm:prompt_tokens_total", "model, priority"), "{{model}} prompt, {{priority}}"),
                Query(rate("vllm:generation_tokens_total", "model, priority"), "{{model}} output, {{priority}}"),
            ),
        ),
        PanelSpec(
            "Being answered", "Requests and calls that have begun and not ended.", "short",
            (
                Query("sum(http_requests_inprogress)", "HTTP"),
                Query("sum(grpc_server_calls_inprogress)", "gRPC"),
            ),
        ),
        PanelSpec(
            "The certificate ends in", "Of the ingress process where that is first; 0 where there is none.", "s",
            (Query("clamp_min(min(hycluster_certificate_expires_timestamp_seconds) - time(), 0)", "certificate"),),
        ),
        PanelSpec(
            "Spans lost", "Of traces, where they are exported: their collector took none, or was away for too long.",
            "short",
            (Query(f"sum by (ingress) (rate(hycluster_spans_lost_total{RATE})) or vector(0)", "{{ingress}}"),),
        ),
        PanelSpec(
            "Prompt lengths", "Of online requests that have ended.", "short", _quantiles("vllm:request_prompt_tokens"),
        ),
    ),
)  # fmt: skip

POOL = DashboardSpec(
    "pool",
    "hycluster / Pool",
    "Replicas: how many there are, how full they are, what became of those that were lost.",
    (
        PanelSpec(
            "Replicas", "That take requests, and that there are to be.", "short",
            (
                Query(latest("hycluster_replicas_ready"), "{{model}} ready"),
                Query(latest("hycluster_replicas_wanted"), "{{model}} wanted"),
            ),
        ),
        PanelSpec(
            "Reached by ingress processes", "Where one reaches fewer than another, the network between is at fault.",
            "short",
            (Query(total("hycluster_replicas_connected", "model, ingress"), "{{model}} {{ingress}}"),),
        ),
        PanelSpec(
            "Lost replicas and failed starts", "Lost in the last hour, as the ingress process that saw most saw it.",
            "short",
            (
                Query(f"max by (model) (increase(hycluster_replicas_lost_total{OF_MODEL}[1h]))", "{{model}} lost"),
                Query(latest("hycluster_replica_failed_starts"), "{{model}} failed starts in a row"),
            ),
        ),
        PanelSpec(
            "Silent for", "How long a replica that has work has sent nothing.", "s",
            (Query(latest("hycluster_replica_silent_seconds", "model, replica"), REPLICA),),
        ),
        PanelSpec(
            "Running and waiting", "Sequences in the engines.", "short",
            (
                Query(latest("vllm:num_requests_running", "model, replica"), f"{REPLICA} running"),
                Query(latest("vllm:num_requests_waiting", "model, replica"), f"{REPLICA} waiting"),
            ),
        ),
        PanelSpec(
            "KV cache in use", "At 1 sequences are preempted, or wait.", "percentunit",
            (Query(latest("vllm:kv_cache_usage_perc", "model, replica"), REPLICA),),
        ),
        PanelSpec(
            "Preempted by engines", "Sequences that lost their KV blocks and are computed again.", "short",
            (Query(rate("vllm:num_preemptions_total", "model, replica"), REPLICA),),
        ),
        PanelSpec(
            "Migrated requests", "Moved to another replica after theirs was lost.", "reqps",
            (Query(rate("hycluster_requests_migrated_total")),),
        ),
        PanelSpec(
            "Stall of migrated requests", "What their callers saw; in the last hour.", "s",
            tuple(
                Query(
                    f"histogram_quantile({share}, sum by (model, le) (increase(hycluster_migration_pause_seconds_bucket"
                    f"{OF_MODEL}[1h])))",
                    f"{{{{model}}}} p{share * 100:g}",
                )
                for share in (0.5, 0.99)
            ),
        ),
        PanelSpec(
            "Tokens computed again", "For migrated requests.", "tokens/s",
            (Query(rate("hycluster_tokens_recomputed_total")),),
        ),
    ),
)  # fmt: skip

ROUTING = DashboardSpec(
    "routing",
    "hycluster / Routing",
    "Which replica gets what, and whether it has its prompts in its KV cache.",
    (
        PanelSpec(
            "Requests routed", "By replica.", "reqps",
            (Query(rate("hycluster_requests_routed_total", "model, replica"), REPLICA),),
        ),
        PanelSpec(
            "In flight", "By replica.", "short",
            (Query(total("hycluster_requests_in_flight", "model, replica"), REPLICA),),
        ),
        PanelSpec(
            "Outstanding tokens", "What is still to prefill or decode, at most; policies by load go by it.", "short",
            (Query(total("hycluster_outstanding_tokens", "model, replica"), REPLICA),),
        ),
        PanelSpec(
            "Imbalance", "The fullest replica's outstanding tokens over the mean's; 1 is even.", "short",
            (
                Query(
                    f"max by (model) ({total('hycluster_outstanding_tokens', 'model, replica')})"
                    f" / clamp_min(avg by (model) ({total('hycluster_outstanding_tokens', 'model, replica')}), 1)"
                ),
            ),
        ),
        PanelSpec(
            "Prefix cache: hit ratio", "Tokens of prompts that were in the KV cache.", "percentunit",
            (Query(_hit_ratio("model, replica"), REPLICA),),
        ),
        PanelSpec(
            "Prefix cache: prediction error", "Tokens of a prompt by which it was predicted wrongly, mean.", "short",
            (
                Query(
                    f"{rate('hycluster_prefix_error_tokens_total', 'model, kind')} / ignoring (kind) group_left"
                    f" clamp_min({rate('hycluster_prefix_predictions_total')}, 0.001)",
                    "{{model}} {{kind}}",
                ),
                Query(
                    f"{rate('hycluster_prefix_cached_tokens_total')}"
                    f" / clamp_min({rate('hycluster_prefix_predictions_total')}, 0.001)",
                    "{{model}} found",
                ),
            ),
        ),
        PanelSpec(
            "Known KV blocks", "What the router's index holds, over all replicas.", "short",
            (Query(total("hycluster_prefix_index_blocks")),),
        ),
        PanelSpec(
            "Prompt tokens by source", "Computed, or found in a cache.", "tokens/s",
            (Query(rate("vllm:prompt_tokens_by_source_total", "model, source"), "{{model}} {{source}}"),),
        ),
    ),
)  # fmt: skip

COLOCATION = DashboardSpec(
    "colocation",
    "hycluster / Co-location",
    "How online and batch work share the engines' steps.",
    (
        PanelSpec(
            "Tokens computed", "For online and for batch work.", "tokens/s",
            (Query(rate("hycluster_engine_tokens_total", "model, priority"), "{{model}} {{priority}}"),),
        ),
        PanelSpec(
            "Batch rows parked", "They hold KV blocks and get no tokens.", "short",
            (Query(latest("hycluster_batch_rows_parked", "model, replica"), REPLICA),),
        ),
        PanelSpec(
            "Batch rows preempted", "They gave slot and KV blocks to online work.", "short",
            (Query(rate("hycluster_batch_rows_preempted_total", "model, replica"), REPLICA),),
        ),
        PanelSpec(
            "Step", "Duration of the last one, measured and as predicted.", "s",
            (Query(latest("hycluster_engine_step_seconds", "model, replica, kind"), f"{REPLICA} {{{{kind}}}}"),),
        ),
        PanelSpec(
            "What a step takes", "As learned: its base, and what each token and sequence adds.", "s",
            (
                Query(
                    latest("hycluster_engine_step_coefficient_seconds", "model, replica, term"),
                    f"{REPLICA} {{{{term}}}}",
                ),
            ),
        ),
    ),
)  # fmt: skip

BATCH = DashboardSpec(
    "batch",
    "hycluster / Batch",
    "Batch jobs and OpenAI batches, as the engines see them. How far each one is, `hycluster batch status` tells.",
    (
        PanelSpec(
            "Rows in flight", "By job; 0 where none has a place.", "short",
            (Query(f"{latest('hycluster_job_rows_in_flight', 'model, batch_job')} or vector(0)",
                   "{{model}} {{batch_job}}"),),
        ),
        PanelSpec(
            "Late", "Time until the end of the window that a batch will miss at its pace; 0 where none will.", "s",
            (Query(f"{latest('hycluster_job_late_deadline_timestamp_seconds', 'model, batch_job')} - time()"
                   " or vector(0)", "{{model}} {{batch_job}}"),),
        ),
        PanelSpec(
            "Batch tokens", "Computed for batch work.", "tokens/s",
            (Query(rate("hycluster_engine_tokens_total", labels=BATCH_WORK)),),
        ),
        PanelSpec(
            "Rows refused, failed, left",
            "Refused rows come back by themselves; of those that failed the job or batch says what becomes of them.",
            "reqps",
            (
                Query(
                    rate("hycluster_requests_refused_total", "model, reason", BATCH_WORK),
                    "{{model}} refused: {{reason}}",
                ),
                Query(
                    rate("hycluster_requests_failed_total", "model, reason", BATCH_WORK), "{{model}} failed: {{reason}}"
                ),
                Query(rate("hycluster_requests_cancelled_total", labels=BATCH_WORK), "{{model}} left"),
            ),
        ),
        PanelSpec(
            "Waits for online work", "Rows that are parked, over the pool.", "short",
            (Query(total("hycluster_batch_rows_parked")),),
        ),
    ),
)  # fmt: skip

EXPERTS = DashboardSpec(
    "experts",
    "hycluster / Experts",
    "Where tokens go in mixture-of-experts models with `routing.expert_metrics: true`.",
    (
        PanelSpec(
            "Tokens by expert", "Over all layers.", "tokens/s",
            (Query(rate("hycluster_expert_tokens_total", "model, expert"), "{{model}} {{expert}}"),),
        ),
        PanelSpec(
            "Skew", "The busiest expert's tokens over the mean's; 1 is even.", "short",
            (Query(latest("hycluster_expert_load_skew_ratio", "model, replica"), REPLICA),),
        ),
        PanelSpec(
            "Skew of ranks", "The busiest expert-parallel rank's tokens over the mean's.", "short",
            (Query(latest("hycluster_expert_rank_load_skew_ratio", "model, replica"), REPLICA),),
        ),
        PanelSpec(
            "Moved", "By random compensation, of all.", "percentunit",
            (Query(latest("hycluster_expert_moved_ratio", "model, replica"), REPLICA),),
        ),
    ),
)  # fmt: skip

SCALING = DashboardSpec(
    "scaling",
    "hycluster / Scaling",
    "Pools that follow their load.",
    (
        PanelSpec(
            "Replicas", "That the autoscaler wants, and that have started.", "short",
            (
                Query(latest("hycluster_replicas_target"), "{{model}} wanted"),
                Query(latest("hycluster_replicas_running"), "{{model}} running"),
            ),
        ),
        PanelSpec(
            "Decisions", "In the last hour, by cause.", "short",
            (Query(f"sum by (model, cause) (increase(hycluster_scaling_decisions_total{OF_MODEL}[1h]))",
                   "{{model}} {{cause}}"),),
        ),
        PanelSpec("Cold start", "The latest one's.", "s", (Query(latest("hycluster_cold_start_seconds")),)),
        PanelSpec(
            "Waiting for a replica", "Requests at ingress processes that no replica is there for.", "short",
            (Query(total("hycluster_requests_without_replica")),),
        ),
    ),
)  # fmt: skip

_FAILED = of_projects("requests", labels='outcome="failed"')
TENANTS = DashboardSpec(
    "tenants",
    "hycluster / Tenants",
    "Who uses how much, of what comes to ingress processes; where the usage ledger is kept. What lines of batches have"
    " had is in that alone: `/ui/usage`, `hycluster usage`.",
    (
        PanelSpec(
            "Requests", "By project and how they ended.", "reqps",
            (Query(of_projects("requests", "tenant, project, outcome"), f"{OWNER} {{{{outcome}}}}"),),
        ),
        PanelSpec(
            "Failed", "Of the requests of a project: engines were asked, and there is no whole answer.", "percentunit",
            (Query(f"{_FAILED} / clamp_min({of_projects('requests')}, 0.001)", OWNER),),
        ),
        PanelSpec(
            "Tokens out", "By project.", "tokens/s",
            (Query(of_projects("tokens", labels='kind="output"'), OWNER),),
        ),
        PanelSpec(
            "Tokens in", "By project: computed, and found in the KV cache.", "tokens/s",
            (Query(of_projects("tokens", "tenant, project, kind", 'kind!="output"'), f"{OWNER} {{{{kind}}}}"),),
        ),
        PanelSpec(
            "Tokens by tenant", "All of them; a limit by the minute or the day is of these.", "tokens/s",
            (Query(of_projects("tokens", "tenant"), "{{tenant}}"),),
        ),
        PanelSpec(
            "Cost", "In the last hour, in `auth.currency`, by the models' prices.", "short",
            (
                Query("sum by (tenant, project) (increase(hycluster_project_cost_total"
                      '{tenant=~"$tenant"}[1h]))', OWNER),
            ),
        ),
        PanelSpec(
            "Refused by limits", "By limits of keys, projects and tenants; lines of batches come again.", "reqps",
            (Query(f"sum by (limit, of) (rate(hycluster_limits_refused_total{RATE}))", "{{limit}} of the {{of}}"),),
        ),
        PanelSpec(
            "Usage ledger: lines", "Written, and given up as a disk took none; 0 where there is no ledger.", "short",
            (
                Query(f"sum by (ingress) (rate(hycluster_ledger_entries_total{RATE})) or vector(0)", "{{ingress}}"),
                Query(f"sum by (ingress) (rate(hycluster_ledger_lost_entries_total{RATE})) or vector(0)",
                      "{{ingress}} lost"),
            ),
        ),
        PanelSpec(
            "Usage ledger: behind", "Age of what is not committed to its store; 0 where there is no ledger.", "s",
            (Query("max by (ingress) (hycluster_ledger_lag_seconds) or vector(0)", "{{ingress}}"),),
        ),
    ),
    chosen_by=("tenant", "hycluster_project_requests_total"),
)  # fmt: skip

DASHBOARDS = (SERVING, POOL, ROUTING, COLOCATION, BATCH, EXPERTS, SCALING, TENANTS)
