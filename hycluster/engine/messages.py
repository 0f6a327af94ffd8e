"""The messages between vLLM's front end and its engine core, without vLLM.

Mirrors of the structs in ``vllm/v1/engine/__init__.py`` and of ``SamplingParams``, as of vLLM 0.32:
only the fields that a simulated engine reads or writes. This is the one place that reaches into that
wire format for simulation. ``tests/engine/test_messages.py`` is the contract: it encodes with vLLM's
own classes and decodes with these, and back. Run it first when the version of vLLM changes.

The structs are arrays on the wire, so the order of the fields is the format: vLLM adds new fields
at the end, and what follows the last field named here is ignored. Tensors would travel in further
frames after the first; nothing that a simulated engine can do needs them.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import msgspec

from hycluster.engine.protocol import Frame


class FinishReason(enum.IntEnum):
    """Why a request ended. vLLM's front end turns ``ERROR`` into an internal server error."""

    STOP = 0
    LENGTH = 1
    ABORT = 2
    ERROR = 3


class SamplingParams(msgspec.Struct, omit_defaults=True, frozen=True):
    """What decides when a request ends. A map on the wire; the defaults are vLLM's.

    Attributes:
        eos_token_id: set by vLLM's input processor, left out when ``ignore_eos`` is asked for.
        all_stop_token_ids: every id that ``min_tokens`` holds back, the end-of-sequence ids included.
    """

    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    eos_token_id: int | None = msgspec.field(default=None, name="_eos_token_id")
    all_stop_token_ids: frozenset[int] = msgspec.field(default=frozenset(), name="_all_stop_token_ids")
    extra_args: dict[str, Any] | None = None


class EngineCoreRequest(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, kw_only=True):
    """One sequence to generate. ``arrival_time`` is in seconds of the front end's clock."""

    request_id: str
    prompt_token_ids: list[int] | None
    mm_features: Any = None
    sampling_params: SamplingParams | None = None
    pooling_params: Any = None
    arrival_time: float
    lora_request: Any = None
    cache_salt: str | None = None
    data_parallel_rank: int | None = None
    prompt_embeds: Any = None
    prompt_is_token_ids: list[bool] | None = None
    client_index: int = 0
    current_wave: int = 0
    priority: int = 0


class EngineCoreEvent(msgspec.Struct, frozen=True):
    """That a request was queued (1), scheduled (2) or preempted (3), by the engine's monotonic clock."""

    type: int
    timestamp: float


class EngineCoreOutput(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, kw_only=True):
    """The new tokens of one request. ``stop_reason`` is the stop token's id, None for end of sequence."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: Any = None
    new_prompt_logprobs_tensors: Any = None
    pooling_output: Any = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    events: list[EngineCoreEvent] | None = None


class UtilityOutput(msgspec.Struct, array_like=True, frozen=True):
    """The answer to a control call.

    Attributes:
        result: None if it failed, else a pair: vLLM's type information (None, as pickle is not
            allowed) and the value.
    """

    call_id: int
    failure_message: str | None = None
    result: tuple[None, Any] | None = None


class EngineCoreOutputs(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, kw_only=True):
    """All that one step has for one client. ``timestamp`` is in seconds of the engine's monotonic clock."""

    engine_index: int = 0
    outputs: list[EngineCoreOutput] = []
    scheduler_stats: Any = None
    timestamp: float = 0.0
    utility_output: UtilityOutput | None = None


_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(EngineCoreRequest)
_outputs_decoder = msgspec.msgpack.Decoder(EngineCoreOutputs)


def encode(message: EngineCoreRequest | EngineCoreOutputs) -> list[Frame]:
    """The frames of a message: always one."""
    return [_encoder.encode(message)]


def decode_request(frames: Sequence[Frame]) -> EngineCoreRequest:
    """Read a request.

    Raises:
        msgspec.MsgspecError: it isn't one.
    """
    return _request_decoder.decode(frames[0] if frames else b"")


def decode_outputs(frames: Sequence[Frame]) -> EngineCoreOutputs:
    """Read the outputs of a step, as a client does.

    Raises:
        msgspec.MsgspecError: they aren't that.
    """
    return _outputs_decoder.decode(frames[0] if frames else b"")


def request_id_of(frames: Sequence[Frame]) -> str | None:
    """The id of a request that can't be read as a whole, so that it can be answered; None if that is lost too."""
    try:
        message = msgspec.msgpack.decode(frames[0] if frames else b"")
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    if isinstance(message, list) and message and isinstance(message[0], str):
        return message[0]
    return None
