"""The contract with vLLM's wire format: its own classes on one side, the mirrors on the other."""

from __future__ import annotations

import importlib
import types
import warnings
from typing import Any

import msgspec
import pytest

from hycluster.engine import messages
from hycluster.engine.messages import (
    EngineCoreEvent,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from hycluster.engine.timing import PREEMPTED, QUEUED, SCHEDULED
from hycluster.timeline import ENGINE_EVENTS


@pytest.fixture(scope="module")
def vllm() -> types.SimpleNamespace:
    with warnings.catch_warnings():
        # What its import warns of is not ours.
        warnings.simplefilter("ignore")
        serial = importlib.import_module("vllm.v1.serial_utils")
        return types.SimpleNamespace(
            SamplingParams=importlib.import_module("vllm.sampling_params").SamplingParams,
            engine=importlib.import_module("vllm.v1.engine"),
            MsgpackEncoder=serial.MsgpackEncoder,
            MsgpackDecoder=serial.MsgpackDecoder,
        )


def request(**changes: object) -> EngineCoreRequest:
    fields: dict[str, object] = {"request_id": "r", "prompt_token_ids": [1, 2], "arrival_time": 1.5}
    return EngineCoreRequest(**(fields | changes))  # type: ignore[arg-type]


def test_a_request_comes_back_as_it_was() -> None:
    params = messages.SamplingParams(
        max_tokens=None, min_tokens=2, eos_token_id=7, all_stop_token_ids=frozenset({7, 9})
    )
    sent = request(sampling_params=params, priority=10)
    assert messages.decode_request(messages.encode(sent)) == sent


def test_outputs_come_back_as_they_were() -> None:
    sent = EngineCoreOutputs(
        outputs=[EngineCoreOutput(request_id="r", new_token_ids=[5], finish_reason=FinishReason.STOP, stop_reason=5)],
        timestamp=3.0,
    )
    assert messages.decode_outputs(messages.encode(sent)) == sent


def test_the_id_is_saved_from_a_request_that_is_wrong() -> None:
    frames = [msgspec.msgpack.encode(["r1", "not a list of ids"])]
    with pytest.raises(msgspec.MsgspecError):
        messages.decode_request(frames)
    assert messages.request_id_of(frames) == "r1"


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x91\xa2\xff\xff", msgspec.msgpack.encode({"a": 1}), b"\x90"])
def test_no_id_where_there_is_none(frame: bytes) -> None:
    assert messages.request_id_of([frame]) is None


@pytest.mark.slow
def test_vllm_requests_are_read(vllm: Any) -> None:
    params = vllm.SamplingParams(
        temperature=0.5, stop=["x"], stop_token_ids=[11], max_tokens=33, min_tokens=3, logprobs=2, prompt_logprobs=1
    )
    params.update_from_generation_config({"eos_token_id": [2, 3]}, 2)
    sent = vllm.engine.EngineCoreRequest(
        request_id="r1",
        prompt_token_ids=[4, 5, 6],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=12.25,
        lora_request=None,
        cache_salt="salt",
        data_parallel_rank=None,
        client_index=3,
        priority=10,
        trace_headers={"traceparent": "00"},
        external_req_id="outer",
        session_id="s",
    )
    read = messages.decode_request(vllm.MsgpackEncoder().encode(sent))
    assert read == EngineCoreRequest(
        request_id="r1",
        prompt_token_ids=[4, 5, 6],
        sampling_params=messages.SamplingParams(
            stop_token_ids=read.sampling_params.stop_token_ids if read.sampling_params else None,
            max_tokens=33,
            min_tokens=3,
            logprobs=2,
            prompt_logprobs=1,
            eos_token_id=2,
            all_stop_token_ids=frozenset({2, 3, 11}),
        ),
        arrival_time=12.25,
        cache_salt="salt",
        client_index=3,
        priority=10,
    )
    assert read.sampling_params is not None
    assert sorted(read.sampling_params.stop_token_ids or ()) == [3, 11]


@pytest.mark.slow
def test_vllm_defaults_are_the_mirrors_defaults(vllm: Any) -> None:
    theirs = vllm.SamplingParams()
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(theirs), type=messages.SamplingParams)
    assert (read.max_tokens, read.min_tokens, read.logprobs, read.prompt_logprobs, read.eos_token_id) == (
        theirs.max_tokens,
        theirs.min_tokens,
        theirs.logprobs,
        theirs.prompt_logprobs,
        theirs.eos_token_id,
    )
    assert read.all_stop_token_ids == theirs.all_stop_token_ids


@pytest.mark.slow
def test_vllm_reads_requests(vllm: Any) -> None:
    sent = request(
        sampling_params=messages.SamplingParams(max_tokens=5, eos_token_id=2, all_stop_token_ids=frozenset({2})),
        client_index=1,
        priority=10,
    )
    read = vllm.MsgpackDecoder(vllm.engine.EngineCoreRequest).decode(messages.encode(sent))
    assert (read.request_id, read.prompt_token_ids, read.arrival_time) == ("r", [1, 2], 1.5)
    assert (read.client_index, read.priority) == (1, 10)
    assert (read.sampling_params.max_tokens, read.sampling_params.eos_token_id) == (5, 2)
    assert read.sampling_params.all_stop_token_ids == {2}


@pytest.mark.slow
def test_vllm_reads_outputs(vllm: Any) -> None:
    decoder = vllm.MsgpackDecoder(vllm.engine.EngineCoreOutputs)
    outputs = [
        EngineCoreOutput(request_id="a", new_token_ids=[5]),
        EngineCoreOutput(request_id="b", new_token_ids=[6], finish_reason=FinishReason.STOP, stop_reason=6),
        EngineCoreOutput(request_id="c", new_token_ids=[], finish_reason=FinishReason.ERROR),
        EngineCoreOutput(request_id="d", new_token_ids=[7], events=[EngineCoreEvent(2, 1.25)]),
    ]
    read = decoder.decode(messages.encode(EngineCoreOutputs(outputs=outputs, timestamp=4.5)))
    assert read.timestamp == 4.5
    assert [(o.request_id, o.new_token_ids, o.finish_reason, o.stop_reason) for o in read.outputs] == [
        ("a", [5], None, None),
        ("b", [6], vllm.engine.FinishReason.STOP, 6),
        ("c", [], vllm.engine.FinishReason.ERROR, None),
        ("d", [7], None, None),
    ]
    assert [(event.type, event.timestamp) for event in read.outputs[3].events] == [(2, 1.25)]
    # And theirs with ours.
    assert messages.decode_outputs(vllm.MsgpackEncoder().encode(read)).outputs == outputs


@pytest.mark.slow
def test_vllm_reads_answers_to_calls(vllm: Any) -> None:
    decoder = vllm.MsgpackDecoder(vllm.engine.EngineCoreOutputs)
    good = decoder.decode(
        messages.encode(EngineCoreOutputs(utility_output=messages.UtilityOutput(3, result=(None, ("generate",)))))
    ).utility_output
    assert (good.call_id, good.failure_message, list(good.result.result)) == (3, None, ["generate"])
    bad = decoder.decode(
        messages.encode(EngineCoreOutputs(utility_output=messages.UtilityOutput(4, failure_message="no")))
    ).utility_output
    assert (bad.call_id, bad.failure_message, bad.result) == (4, "no", None)


@pytest.mark.slow
def test_what_happens_to_a_request_has_the_same_numbers(vllm: Any) -> None:
    theirs = {kind.name.lower(): int(kind) for kind in vllm.engine.EngineCoreEventType}
    assert {name: number for number, name in ENGINE_EVENTS.items()} == theirs
    assert theirs == {"queued": QUEUED, "scheduled": SCHEDULED, "preempted": PREEMPTED}


@pytest.mark.slow
def test_finish_reasons_have_the_same_numbers(vllm: Any) -> None:
    assert {reason.name: int(reason) for reason in FinishReason}.items() <= {
        reason.name: int(reason) for reason in vllm.engine.FinishReason
    }.items()
