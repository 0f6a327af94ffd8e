"""Settings: YAML in, frozen pydantic models out, before anything heavy is imported.

Unknown keys are refused. Every error names the field, the value and what is allowed. All keys are in this one file: it
is their reference.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hycluster.errors import SettingsError, shown
from hycluster.explain import explain
from hycluster.unique_keys import TwiceError, read_yaml

DEFAULT_SETTINGS = Path("deployments/local.yaml")
Port = Annotated[int, Field(ge=0, le=65535)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$"
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=NAME_PATTERN)]
# As Kubernetes has them.
LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
LabelKey = Annotated[str, Field(pattern=LABEL_KEY)]
LabelValue = Annotated[str, Field(pattern=LABEL_VALUE)]
# Nodes wait for it: a day is a typo's bound, not a wish's.
MAX_DRAIN_S = 86400
URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/|s3:", re.IGNORECASE)
BUCKET = re.compile(r"s3://([^/@\s]+@)?[A-Za-z0-9]")
M = TypeVar("M", bound=BaseModel)


def home() -> Path:
    """Where prepared models and state live: ``$HYCLUSTER_HOME``, by default ``~/.cache/hycluster``."""
    return Path(os.environ.get("HYCLUSTER_HOME") or Path.home() / ".cache" / "hycluster").expanduser()


class Strict(BaseModel):
    """Base of all settings: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Eplb(Strict):
    """Expert parallel load balancing: vLLM moves and copies experts so that all ranks have as much to do.

    Attributes:
        redundant_experts: copies of busy experts, over all ranks.
        window_size: engine steps whose load counts.
        step_interval: engine steps between two rearrangements.
    """

    enabled: bool = False
    redundant_experts: int = Field(default=0, ge=0)
    window_size: int = Field(default=1000, ge=1)
    step_interval: int = Field(default=3000, ge=1)

    @model_validator(mode="after")
    def _redundant_when_enabled(self) -> Eplb:
        if self.redundant_experts and not self.enabled:
            raise ValueError(f"redundant_experts: {self.redundant_experts} is without effect; set enabled to true")
        return self


class Parallel(Strict):
    """How one replica's engine is cut over devices. Its device count is tensor x pipeline x data.

    Attributes:
        tensor: ranks that share each layer.
        pipeline: stages, each with some of the layers.
        data: ranks that share the experts and have requests, and all else, of their own.
        expert: experts lie whole on the tensor x data ranks; otherwise each is cut over all of them.
    """

    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    data: int = Field(default=1, ge=1)
    expert: bool = False
    eplb: Eplb = Eplb()

    @model_validator(mode="after")
    def _experts_to_balance(self) -> Parallel:
        if self.eplb.enabled and not self.expert:
            raise ValueError("eplb.enabled: true is not allowed; needs expert: true")
        if self.eplb.enabled and self.expert_ranks == 1:
            raise ValueError("eplb.enabled: true is not allowed; needs more ranks than one (tensor, data)")
        return self

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def devices_per_rank(self) -> int:
        """Devices of one data-parallel rank."""
        return self.tensor * self.pipeline

    @property
    def expert_ranks(self) -> int:
        """Ranks that a layer's experts are spread over."""
        return self.tensor * self.data


class Hardware(Strict):
    """What one replica reserves.

    Attributes:
        accelerator: Ray's name of a GPU type (``H20``, ``H100``, ...), or None to run on CPU.
        cpus: Ray CPUs of each data-parallel rank. On CPU: of each rank, tensor and pipeline too, and its threads.
        memory_gib: memory to reserve for the replica, not counting the KV cache; None reserves none.
        kv_cache_gib: size of the KV cache on CPU, of each rank. On a GPU vLLM sizes it (``gpu_memory_utilization``).
        kv_offload_gib: host memory that keeps KV blocks after the KV cache has dropped them, so that a prompt seen
            before is not computed again; not counted in ``memory_gib``. None keeps none.
        placement: how Ray lays a replica of several reservations (a data-parallel rank each, or a GPU each where a
            rank spans nodes) over nodes: few nodes or many, if that can be (``pack``, ``spread``) or else not at
            all (``strict_pack``: one node; ``strict_spread``: a node each).
        gpus_per_node: a rank of more devices than that is spread over nodes.
        node_selector: on Kubernetes, labels of the nodes that its pods go to; by default those by which NVIDIA's
            operator tells the accelerator, where it has one name only.
        resources: what each of a replica's reservations takes besides, by Ray's names of custom resources: only nodes
            that have them hold it. ``hycluster k8s render`` sets it where several models have pods of their own.
    """

    accelerator: str | None = None
    cpus: float = Field(default=1, gt=0)
    memory_gib: float | None = Field(default=None, gt=0)
    kv_cache_gib: float = Field(default=1, gt=0)
    kv_offload_gib: float | None = Field(default=None, gt=0)
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    gpus_per_node: int = Field(default=8, ge=1)
    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)


class Replicas(Strict):
    """How many engines a model's pool has; a data-parallel group counts as one.

    Attributes:
        min: 0 lets the pool sleep while nobody asks.
        max: above ``min``, the pool follows its load (``autoscaling``); ``min`` by default.
        initial: how many it starts with; ``min`` by default.
    """

    min: int = Field(default=1, ge=0)
    max: int | None = Field(default=None, ge=1)
    initial: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> Replicas:
        if self.min == 0 and self.max is None:
            raise ValueError("min: 0 is not allowed without max; set max to the most replicas that there may be")
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max: {self.max} is below min ({self.min})")
        if self.initial is not None and not self.min <= self.initial <= self.most:
            raise ValueError(f"initial: {self.initial} is not between min ({self.min}) and max ({self.most})")
        return self

    @property
    def count(self) -> int:
        """How many there are at first; of a pool of fixed size, always."""
        return self.min if self.initial is None else self.initial

    @property
    def most(self) -> int:
        return self.min if self.max is None else self.max

    @property
    def vary(self) -> bool:
        return self.most > self.min


class Autoscaling(Strict):
    """When a pool grows and shrinks, where ``replicas.max`` is above ``replicas.min``; see ``docs/autoscaling.md``.

    Attributes:
        target_outstanding_tokens: for so many tokens to prefill or decode there is to be a replica.
        expected_output_tokens: of a request that may have a longer output, no more are counted as outstanding.
        target_kv_usage: share of a replica's KV cache that may be in use.
        target_batch_usage: sequences that a replica may have, queued ones too, as a share of ``max_num_seqs``.
        scale_up_after_s: how long too few replicas are put up with; a pool that sleeps is woken at once.
        scale_down_after_s: for so long fewer replicas must have been enough. At least a cold start, in any case.
        scale_to_zero_after_s: with ``replicas.min: 0``, how long nobody must have asked until the pool sleeps.
        cold_start: with ``replicas.min: 0``, whether a request that finds no replica waits for one or is refused with
            the time after which to come back. Either wakes the pool.
        max_cold_start_wait_s: how long such a request waits at most.
    """

    target_outstanding_tokens: int = Field(default=65536, ge=1)
    expected_output_tokens: int = Field(default=512, ge=1)
    target_kv_usage: float = Field(default=0.8, gt=0, le=1)
    target_batch_usage: float = Field(default=0.8, gt=0, le=1)
    scale_up_after_s: float = Field(default=2, ge=0)
    scale_down_after_s: float = Field(default=300, ge=0)
    scale_to_zero_after_s: float = Field(default=600, ge=0)
    cold_start: Literal["wait", "refuse"] = "wait"
    max_cold_start_wait_s: float = Field(default=600, gt=0)


class Simulated(Strict):
    """A timing model in the place of a real engine: for tests of control logic and for simulation only.

    One step takes ``step_base_s + prefill_token_s * prefill tokens + decode_token_s * decode tokens``.
    Output tokens are a fixed function of the prompt; they mean nothing.
    """

    step_base_s: float = Field(default=0.002, ge=0)
    prefill_token_s: float = Field(default=0.00002, ge=0)
    decode_token_s: float = Field(default=0.0002, ge=0)
    max_num_seqs: int = Field(default=64, ge=1)
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    kv_blocks: int = Field(default=4096, ge=1)
    block_size_tokens: int = Field(default=16, ge=1)
    max_model_len: int = Field(default=32768, ge=2)
    vocab_size: int = Field(default=32000, ge=1, le=2**31)
    realtime: bool = True

    @model_validator(mode="after")
    def _one_fits(self) -> Simulated:
        tokens = self.kv_blocks * self.block_size_tokens
        if tokens < self.max_model_len:
            raise ValueError(
                f"kv_blocks: {self.kv_blocks} hold {tokens} tokens, fewer than max_model_len ({self.max_model_len})"
            )
        return self


class Health(Strict):
    """When a replica is given up and replaced; see ``docs/health.md``.

    Attributes:
        hung_after_s: an engine that has work and finishes no step for so long is hung. Must be above its longest honest
            step: ``max_num_batched_tokens`` of prefill on the slowest node, and what is compiled on first use.
        probe_after_s: an engine that has had no work for so long is asked for a token.
        stopped_after_s: a replica's process that has been stopped (SIGSTOP) for so long is killed.
    """

    hung_after_s: float = Field(default=120, gt=0)
    probe_after_s: float = Field(default=30, gt=0)
    stopped_after_s: float = Field(default=1, gt=0)


class Adapter(Strict):
    """A LoRA adapter in PEFT's format, on all replicas of a model.

    Attributes:
        name: what callers put in ``model``.
        source: a folder that every node sees, or a hub id. Changed weights need a source of their own: what is
            cached is told apart by name and source.
    """

    name: Name
    source: str = Field(min_length=1)


class Recycle(Strict):
    """Random compensation: an expert over its capacity hands tokens to experts that have room.

    Attributes:
        capacity_factor: an expert's capacity in a step, over its fair share of the step's tokens.
        min_capacity_tokens: capacity is never below it. In a small decode batch an expert's time is that of reading
            its weights, however many tokens it has, so moving tokens there costs quality and gains nothing.
        seed: the same batch, seed and factor give the same experts.
    """

    capacity_factor: float = Field(default=1.0, gt=0, le=1024)
    min_capacity_tokens: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)


class Routing(Strict):
    """How a mixture-of-experts model chooses its experts (models of ``hycluster/models``).

    Attributes:
        recycle: None is plain top-k. With it a request's output depends on what it shares a batch with.
        expert_metrics: count tokens by expert and show them under ``/metrics``.
    """

    recycle: Recycle | None = None
    expert_metrics: bool = False


class Model(Strict):
    """One model and its pool.

    Attributes:
        name: what callers put in ``model``.
        source: a path, a hub id, or ``package:NAME`` for weights that a Python package ships.
        engine: any argument of vLLM's engine, by its Python name.
        api: any argument of vLLM's API server that belongs to the model (``tool_call_parser``,
            ``reasoning_parser``, ``chat_template``, ...), by its Python name.
        adapters: LoRA adapters, each served under its own name beside the model.
        routing: how a mixture-of-experts model chooses its experts.
        health: when a replica is given up.
        autoscaling: when its pool grows and shrinks.
        simulated: set to replace the engine by a timing model.
    """

    name: Name
    source: str = Field(min_length=1)
    engine: dict[str, Any] = Field(default_factory=dict)
    api: dict[str, Any] = Field(default_factory=dict)
    parallel: Parallel = Parallel()
    hardware: Hardware = Hardware()
    replicas: Replicas = Replicas()
    adapters: tuple[Adapter, ...] = ()
    routing: Routing = Routing()
    health: Health = Health()
    autoscaling: Autoscaling = Autoscaling()
    simulated: Simulated | None = None

    @model_validator(mode="after")
    def _simulated_has_no_adapters(self) -> Model:
        if self.simulated is not None and self.adapters:
            raise ValueError(f"adapters: {self.adapters[0].name!r} is not allowed; a simulated engine has no adapters")
        return self

    @model_validator(mode="after")
    def _autoscaling_has_room(self) -> Model:
        if self.autoscaling.model_fields_set and not self.replicas.vary:
            name = min(self.autoscaling.model_fields_set)
            raise ValueError(
                f"autoscaling.{name}: is without effect; set replicas.max above replicas.min ({self.replicas.min})"
            )
        return self

    @property
    def engines(self) -> int:
        """Most engines that requests go to: every data-parallel rank of every replica is one."""
        return self.replicas.most * self.parallel.data

    @property
    def sleeps(self) -> bool:
        """Its pool may have no replica, in good order; a request wakes it."""
        return self.replicas.min == 0

    @property
    def names(self) -> tuple[str, ...]:
        """What callers may put in ``model`` to reach this pool."""
        return self.name, *(adapter.name for adapter in self.adapters)


class Http(Strict):
    """The HTTP door.

    Attributes:
        port: 0 takes a free one.
        control_routes: open also the routes that change an engine's state (sleep, LoRA loading, ...).
        allowed_origins: origins for CORS.
        max_connections: open connections of one door.
        max_body_mib: most of a request's body. 32 MiB hold a 256k-token prompt as text or as ids with room to spare.
        max_bodies_mib: most of all bodies of the requests that a door has in work.
        stalled_client_timeout_s: how long a client may keep the door waiting: for a request that it has begun to
            send, or for room for an answer that it does not read. Then it is cut off and its request aborted. So is one
            whose machine has gone without a word.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    control_routes: bool = False
    allowed_origins: tuple[str, ...] = ()
    max_connections: int = Field(default=4096, ge=1)
    max_body_mib: int = Field(default=32, ge=1, le=1024)
    max_bodies_mib: int = Field(default=512, ge=1)
    stalled_client_timeout_s: float = Field(default=60, gt=0)


class Grpc(Strict):
    """The gRPC door.

    Attributes:
        max_message_mib: 32 MiB hold a 256k-token prompt as text or as ids with room to spare.
        max_calls: calls of one door at a time, all methods together.
        max_calls_per_connection: the further calls of a client wait until it has fewer.
        stalled_client_timeout_s: how long a caller may leave the next chunk of its stream unread. Then its request
            is aborted. So is that of one whose machine has gone without a word.
    """

    host: str = "127.0.0.1"
    port: Port = 9000
    max_message_mib: int = Field(default=32, ge=1, le=1024)
    max_calls: int = Field(default=4096, ge=1)
    max_calls_per_connection: int = Field(default=1024, ge=1)
    stalled_client_timeout_s: float = Field(default=60, gt=0)


class Admission(Strict):
    """When a door sheds load, per gateway and model: two doors admit twice as much. None is no limit.

    Attributes:
        max_requests: sequences in flight (``n`` counts as n).
        max_outstanding_tokens: prompt tokens not yet prefilled plus output tokens still allowed.
        max_retry_after_s: longest time that a caller that was shed is told to wait.
        max_grammar_kib: most of a JSON schema, regex, grammar or list of choices that an output must follow.
    """

    max_requests: int | None = Field(default=1024, ge=1)
    max_outstanding_tokens: int | None = Field(default=None, ge=1)
    max_retry_after_s: float = Field(default=60, ge=1)
    max_grammar_kib: int = Field(default=64, ge=1)


class Router(Strict):
    """Which replica a request goes to; see ``hycluster/router.py`` for the policies.

    Attributes:
        session_slack_tokens: requests of one session go to one replica, which has the earlier turns in its KV cache,
            as long as that one has at most so many tokens more outstanding than the least loaded. None: sessions
            are of no account.
        failover: a request whose replica was lost, or drained away, goes on elsewhere; else it ends, once it has begun.
        failover_wait_s: how long such a request waits for a place on another replica.
    """

    policy: Literal["least_outstanding_tokens", "power_of_two"] = "least_outstanding_tokens"
    session_slack_tokens: int | None = Field(default=8192, ge=0)
    failover: bool = True
    failover_wait_s: float = Field(default=120, ge=0)


class DataPlane(Strict):
    """Where replicas listen for gateways.

    Attributes:
        host: address to bind; None is the address by which Ray knows the node.
        port_min, port_max: range to bind in; both 0 is any free port.
        lost_after_s: a peer from whose machine nothing comes for so long is lost, and its requests go on elsewhere. How
            busy a peer is does not matter: its sockets answer by themselves.
    """

    host: str | None = None
    port_min: Port = 0
    port_max: Port = 0
    lost_after_s: float = Field(default=6, ge=1, le=60)

    @model_validator(mode="after")
    def _range(self) -> DataPlane:
        if self.port_max < self.port_min:
            raise ValueError(f"port_max: {self.port_max} is below port_min ({self.port_min})")
        return self


class Batches(Strict):
    """OpenAI's Batch API at the HTTP doors; see ``hycluster/batch_api``.

    Attributes:
        store: folder or ``s3://`` URI for files and batches, the same for all nodes; None is ``batches`` below
            ``HYCLUSTER_HOME``, which does for one machine.
        max_file_mib: most of an uploaded file.
        max_lines: most requests of a batch. Checking that their ids differ takes about 100 bytes of memory each.
        lines_in_flight: most requests in the engines at once, of all batches together.
        shard_lines: requests that are committed as one, and asked again as one if the process dies.
        concurrent_batches: batches that run side by side; the others wait.
        poll_s: seconds between two looks for new batches and for cancelled ones.
        keep_days: age at which files are deleted for which no other was asked for; None keeps them.
        resources: what the process that runs batches reserves, by Ray's names of custom resources: only nodes that have
            them hold it. Empty: it goes anywhere. It takes no CPU.
    """

    store: str | None = Field(default=None, min_length=1)
    max_file_mib: int = Field(default=512, ge=1, le=1 << 20)
    max_lines: int = Field(default=200_000, ge=1, le=50_000_000)
    lines_in_flight: int = Field(default=256, ge=1, le=100_000)
    shard_lines: int = Field(default=64, ge=1, le=100_000)
    concurrent_batches: int = Field(default=8, ge=1, le=1000)
    poll_s: float = Field(default=1.0, gt=0, le=60)
    keep_days: float | None = Field(default=None, gt=0)
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)

    @field_validator("store")
    @classmethod
    def _store_is_no_typo(cls, store: str | None) -> str | None:
        """What looks like a URI and is none that is known would be a folder's name."""
        if store and URI.match(store) and not BUCKET.match(store):
            told = re.sub(r"//[^/@]*@", "//...@", store)
            raise ValueError(f"{shown(told)} is not allowed; must be s3://BUCKET, with a path or without, or a folder")
        return store


class Settings(Strict):
    """A way of running the cluster: one of ``deployments/*.yaml``.

    Attributes:
        doors: door processes; each holds both doors, and a gateway a model.
        door_resources: what a door reserves, by Ray's names of custom resources: only nodes that have them hold
            doors. Leave room for a door's successor. Empty: doors go anywhere.
        doors_per_node: most doors on one node, not counting successors that are about to take over; a door for which
            there is no node waits for one. None: where there are several nodes, as many as it takes when they are
            spread evenly over those that are there at the start; no bound where there is one.
        batches: None closes the Batch API.
        start_timeout_s: how long a pool may take until its engines are ready.
        drain_timeout_s: how long work in flight may go on where it is after a shutdown, or a replacement, is asked for.
        hand_over_after_s: age of a replica's drain at which what is left there goes on at other replicas, if there are
            any that take requests; above ``drain_timeout_s`` it has no effect.
    """

    models: tuple[Model, ...] = Field(min_length=1)
    http: Http = Http()
    grpc: Grpc = Grpc()
    doors: int = Field(default=1, ge=1, le=64)
    door_resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    doors_per_node: int | None = Field(default=None, ge=1)
    router: Router = Router()
    admission: Admission = Admission()
    data_plane: DataPlane = DataPlane()
    batches: Batches | None = Batches()
    start_timeout_s: float = Field(default=600, gt=0)
    drain_timeout_s: float = Field(default=60, gt=0, le=MAX_DRAIN_S)
    hand_over_after_s: float = Field(default=10, ge=0)

    @model_validator(mode="after")
    def _names_differ(self) -> Settings:
        names = [name for model in self.models for name in model.names]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"models: the name {name!r} is given {names.count(name)} times; names must differ")
        return self

    def model(self, name: str) -> Model:
        """The model of that name, or the one that has an adapter of that name.

        Raises:
            SettingsError: there is none.
        """
        for model in self.models:
            if name in model.names:
                return model
        raise SettingsError(f"model: {shown(name)} is not in the settings; there are {[m.name for m in self.models]}")


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        SettingsError: the file is missing, is no YAML, gives a key twice, or is no mapping.
    """
    path = Path(path)
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file") from None
    except OSError as error:
        raise SettingsError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not text in UTF-8") from error
    except TwiceError as error:
        raise SettingsError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if data is None:
        raise SettingsError(f"{path}: is empty; must be a mapping of settings")
    if not isinstance(data, dict):
        raise SettingsError(f"{path}: must be a mapping of settings, not {type(data).__name__}")
    return data


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply ``--set a.b.c=VALUE`` (VALUE is YAML) to a copy of ``data``.

    Numbers index into lists: ``models.0.name=x``.
    """
    result: dict[str, Any] = copy.deepcopy(data)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise SettingsError(f"--set: {shown(assignment)} must be of the form KEY=VALUE")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        *parents, last = key.split(".")
        target: Any = result
        try:
            for part in parents:
                target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
            target[int(last) if isinstance(target, list) else last] = value
        except (TypeError, ValueError, IndexError, AttributeError):
            raise SettingsError(f"--set: {shown(key)} names no place in the settings") from None
    return result


def validate(kind: type[M], data: dict[str, Any], where: str) -> M:
    """Turn a mapping into settings of a kind.

    Raises:
        SettingsError: one line for each wrong field, with its value and what is allowed.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise SettingsError("\n".join(explain(kind, error, where))) from None


def load_settings(path: str | Path = DEFAULT_SETTINGS, assignments: Sequence[str] = ()) -> Settings:
    """Read and check a deployment's settings.

    Raises:
        SettingsError: names the file, the field, the value and what is allowed.
    """
    return validate(Settings, override(load_yaml(path), assignments), str(path))
