"""The nouns of the house. Standard library only; every other module may import this one."""

from __future__ import annotations

import enum
import json
import numbers
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from hycluster.errors import InvalidInput, shown

# What vLLM makes of them takes half a second for eight thousand, in the loop that serves all others.
MAX_TOOLS = 1024


class Priority(enum.IntEnum):
    """Who goes first in the engine's queue: the lower number. Passed on to vLLM's priority scheduling."""

    ONLINE = 0
    BATCH = 10


def is_number(value: object) -> bool:
    """Python takes true and false for numbers; nobody means them."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole_number(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


# Fields of a Sampling that may be unset.
_OPTIONAL = frozenset(
    {"max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Field names and ranges are vLLM's; unset fields take the model's defaults.

    Attributes:
        max_tokens: most tokens to generate; ``None`` is what the context leaves.
        min_tokens: fewest tokens to generate before a stop string or the end token counts.
        temperature: 0 is greedy; at most 100.
        top_p: sample from the most probable tokens that together have this probability.
        top_k: sample from so many most probable tokens; -1 or 0 is all.
        min_p: least probability of a token, as a fraction of the most probable one's.
        presence_penalty, frequency_penalty: from -2 to 2, for tokens that the output has already: once, or each time.
        repetition_penalty: above 1 discourages tokens that prompt or output have already.
        seed: the same request with the same seed gives the same output.
        stop: strings that end the text (not part of the output).
        stop_token_ids: token ids that end the text.
        ignore_eos: go on after the model's end token.
        n: outputs for one prompt.
        logprobs: number of candidates to report for each token; ``None`` is none.

    Raises:
        InvalidInput: names the field, the value and what is allowed.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None

    # Read by pydantic where a settings model holds a Sampling.
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise InvalidInput(f"sampling.{name}: {shown(getattr(self, name))} is not allowed; must be {allowed}")

        for name in ("max_tokens", "min_tokens", "top_k", "seed", "n", "logprobs"):
            value = getattr(self, name)
            check(name, is_whole_number(value) or (value is None and name in _OPTIONAL), "a whole number")
        for name in (
            "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
        ):  # fmt: skip
            value = getattr(self, name)
            check(name, is_number(value) or (value is None and name in _OPTIONAL), "a number")
        for name, fits, allowed in (
            ("stop", lambda value: isinstance(value, str), "strings"),
            ("stop_token_ids", is_whole_number, "whole numbers"),
        ):
            values = getattr(self, name)
            check(name, isinstance(values, (tuple, list)) and all(map(fits, values)), f"a tuple of {allowed}")
        check("ignore_eos", isinstance(self.ignore_eos, bool), "true or false")
        check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        check("min_tokens", self.min_tokens >= 0, "at least 0")
        check(
            "min_tokens",
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"at most max_tokens ({self.max_tokens})",
        )
        check("temperature", self.temperature is None or 0 <= self.temperature <= 100, "from 0 to 100")
        check("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1")
        check("top_k", self.top_k is None or self.top_k >= -1, "at least -1")
        check("min_p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1")
        check("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2")
        check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2")
        check("repetition_penalty", self.repetition_penalty is None or self.repetition_penalty > 0, "above 0")
        check("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a signed 64-bit number")
        check("stop", all(self.stop), "strings that are not empty")
        check("n", 1 <= self.n <= 128, "from 1 to 128")
        check("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """What form the output must have. Exactly one is set.

    Attributes:
        json_schema: a JSON schema, as an object or as its text.
        json_object: any JSON object.
        regex: the whole text matches it.
        choice: the text is one of these.
        grammar: EBNF, as xgrammar or llguidance read it.

    Raises:
        InvalidInput: names the field, the value and what is allowed.
    """

    json_schema: str | dict[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                value = shown(getattr(self, name))
                raise InvalidInput(f"structured_output.{name}: {value} is not allowed; must be {allowed}")

        check("json_object", isinstance(self.json_object, bool), "true or false")
        names = [one.name for one in fields(self)]
        given = ", ".join(name for name in names if getattr(self, name) not in (None, False)) or "none"
        if given not in names:
            raise InvalidInput(f"structured_output: exactly one of {', '.join(names)} must be set; set are {given}")
        check("json_schema", self.json_schema is None or _is_schema(self.json_schema), "a JSON schema: an object")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            check(name, value is None or (isinstance(value, str) and bool(value)), "a string that is not empty")
        choice = self.choice
        is_list = isinstance(choice, (tuple, list)) and bool(choice)
        check("choice", choice is None or (is_list and all(isinstance(one, str) for one in choice)), "some strings")


def _is_schema(value: object) -> bool:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return isinstance(value, dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request in the house's own words, whichever ingress it came through: HTTP or gRPC.

    Exactly one of ``prompt`` (text), ``messages`` (chat, OpenAI's form) and ``token_ids`` is set. What follows is
    OpenAI's too.

    Attributes:
        structured_output: the form that the output must have.
        tools: what the model may call; with ``messages`` only, as are all below.
        tool_choice: "auto" (the default), "none", "required", or ``{"type": "function", "function": {"name": ...}}``.
        parallel_tool_calls: False is one call at the most.
        include_reasoning: False leaves out what a model with a reasoning parser thinks, and with it token ids and
            logprobs.
        reasoning_effort: "none", "minimal", "low", "medium", "high", "xhigh" or "max", where the template knows it.
        chat_template_kwargs: for the model's chat template, such as ``{"enable_thinking": False}``.
        job: at batch priority, whose places in the engines it takes one of; None: it is in no job, or its caller has
            taken one for it.
    """

    model: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    token_ids: list[int] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    priority: Priority = Priority.ONLINE
    request_id: str | None = None
    session_id: str | None = None
    structured_output: StructuredOutput | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    job: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("prompt", "messages", "token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidInput(
                f"prompt, messages, token_ids: exactly one must be set; set are {', '.join(given) or 'none'}"
            )
        if not getattr(self, given[0]):
            raise InvalidInput(f"{given[0]}: must not be empty")
        if self.messages is None:
            unset = {name.name: name.default for name in fields(GenerationRequest)}
            for name in _OF_A_CHAT:
                if getattr(self, name) != unset[name]:
                    raise InvalidInput(f"{name}: goes with messages only; given is {given[0]}")
        if self.tools is None and self.tool_choice not in (None, "none"):
            raise InvalidInput(f"tool_choice: {shown(self.tool_choice)} is not allowed without tools")
        if self.tools is not None and not self.tools:
            raise InvalidInput("tools: must not be empty; leave it out instead")
        if len(self.tools or ()) > MAX_TOOLS:
            raise InvalidInput(f"tools: there are {len(self.tools or ())}; at most {MAX_TOOLS} are allowed")
        if self.structured_output is not None and self.tool_choice not in (None, "none", "auto"):
            raise InvalidInput(f"structured_output: can't go with tool_choice {shown(self.tool_choice)}, a forced call")


class ChatFields(TypedDict, total=False):
    """What a chat's prompt depends on beside its messages; see :class:`GenerationRequest`."""

    tools: list[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None
    reasoning_effort: str | None
    chat_template_kwargs: dict[str, Any] | None


class PromptFields(ChatFields, total=False):
    """What is tokenized: a text, or a chat and what its prompt depends on."""

    prompt: str | None
    messages: list[dict[str, Any]] | None


_OF_A_CHAT = (*ChatFields.__annotations__, "parallel_tool_calls", "include_reasoning")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the model wants, or in a stream what is new of it.

    Attributes:
        index: which of the output's calls, from 0.
        id: what a message of role "tool" names as the call that it answers; in a stream in the call's first delta.
        name: the function's; in a stream in the call's first delta.
        arguments: JSON as the model wrote it, which need not fit the schema; in a stream the next piece.
    """

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One candidate for one position: its token id, its text and its natural-log probability."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Output:
    """What one of the ``n`` sequences produced since the last chunk (streaming) or in all (unary).

    Attributes:
        index: which of the ``n``.
        text: without what is in the two last ones.
        finish_reason: ``stop``, ``length`` or ``tool_calls``; ``None`` while it goes on.
        logprobs: one list a token, the sampled token first; ``None`` if not asked for.
        reasoning: what the model thought before, if it has a reasoning parser.
        tool_calls: what it wants called.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[list[TokenLogprob]] | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens in and out; ``completion_tokens`` is the sum over all ``n`` sequences."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """A chunk of a stream, or a whole answer. ``usage`` is set in the last one only."""

    request_id: str
    model: str
    outputs: list[Output]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """Of the first sequence, which is all of them unless ``n`` asked for more; empty in a delta without any."""
        return "".join(output.text for output in self.outputs if output.index == 0)

    @property
    def reasoning(self) -> str:
        """Of the first sequence, as ``text``."""
        return "".join(output.reasoning for output in self.outputs if output.index == 0)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Of the first sequence, as ``text``."""
        return tuple(call for output in self.outputs if output.index == 0 for call in output.tool_calls)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model that this cluster serves."""

    name: str
    max_model_len: int
    ready_replicas: int


@dataclass(frozen=True, slots=True)
class ReplicaAddress:
    """Where and how a gateway reaches one replica's engine.

    Attributes:
        replica_id: unique over the life of the cluster.
        requests: ZMQ endpoint that takes requests.
        outputs: ZMQ endpoint that sends outputs, one message an engine step.
        token: what the gateway says in its hello; known only inside the Ray cluster, as the secret below is.
        lost_after_s: setting of the same name, for both ends.
        server_key: the replica's public key; empty if what travels is not encrypted.
        client_key, client_secret: the key pair by which the replica knows who may connect.
    """

    replica_id: str
    model: str
    requests: str
    outputs: str
    token: str = field(repr=False)
    lost_after_s: float = 6.0
    server_key: str = ""
    client_key: str = ""
    client_secret: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """How a replica's routers spread tokens over experts; a token counts once for each expert it is given to.

    Attributes:
        tokens: by expert, over all layers, since the replica started.
        moved: how many of these random compensation moved.
        skew: the busiest expert's tokens over the mean's, layer by layer, over the last seconds with work; 1 is even.
        rank_skew: the same for expert parallel ranks; None without them.
    """

    tokens: tuple[int, ...]
    moved: int = 0
    skew: float = 1.0
    rank_skew: float | None = None


@dataclass(frozen=True, slots=True)
class ColocationLoad:
    """How an engine shares its steps between online and bulk work.

    Attributes:
        parked: bulk rows that held their KV blocks through the last step and got no token in it.
        given_up: bulk rows that gave their slot and blocks to online work, since the engine started.
        bulk_tokens, online_tokens: tokens computed, prompts' too, since the engine started.
        predicted_step_s, real_step_s: of the last step.
        bulk_running: bulk rows that have a slot and KV blocks; the parked ones are among them.
        bulk_waiting: bulk rows that have none.
        step_time_s: what it has learned of its steps: base, a token of prefill, a sequence, a token of KV cache read;
            all 0 while it knows nothing yet.
    """

    parked: int = 0
    given_up: int = 0
    bulk_tokens: int = 0
    online_tokens: int = 0
    predicted_step_s: float = 0.0
    real_step_s: float = 0.0
    bulk_running: int = 0
    bulk_waiting: int = 0
    step_time_s: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


# A series of vLLM's and its value: name, labels, value.
EngineSample = tuple[str, tuple[tuple[str, str], ...], float]


@dataclass(frozen=True, slots=True)
class GatewayWork:
    """What one replica has of one gateway's requests, as that gateway knows it.

    Attributes:
        prefill_tokens: of prompts whose first token has not come, without what is expected to be cached.
        bulk_prefill_tokens: the same of rows of bulk, which are not among these.
        requests: running and waiting.
        decoding: those of them whose first token has come.
        kv_tokens: of all of them, prompts and outputs so far.
    """

    prefill_tokens: int = 0
    requests: int = 0
    decoding: int = 0
    kv_tokens: int = 0
    bulk_prefill_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a replica last said of itself.

    Attributes:
        running: sequences in the current batch.
        waiting: sequences in the queue.
        most_running: sequences that a batch holds at most; 0 if that is not known.
        kv_usage: share of the KV cache in use, 0 to 1.
        outstanding_tokens: by gateway id, tokens still to prefill or decode for it.
        work: by gateway id, what there is of it, where gateways follow KV blocks.
        experts: None unless the settings ask for it (``routing.expert_metrics``).
        colocation: None where the engine schedules as vLLM does by itself.
        samples: vLLM's own metrics of its scheduler.
    """

    running: int = 0
    waiting: int = 0
    most_running: int = 0
    kv_usage: float = 0.0
    outstanding_tokens: dict[str, int] = field(default_factory=dict)
    work: dict[str, GatewayWork] = field(default_factory=dict)
    experts: ExpertLoad | None = None
    colocation: ColocationLoad | None = None
    samples: tuple[EngineSample, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class BulkDemand:
    """What one job has, and wants, of a pool through one gateway.

    Attributes:
        rows: places that it has in the engines.
        more: it wants more of them.
        urgent_at: seconds since the epoch: the deadline that it would miss at its pace; None if it is not late.
    """

    rows: int
    more: bool = False
    urgent_at: float | None = None
