"""What the rich status says of fields; the rest is in test_grpc.py, over a socket."""

from __future__ import annotations

import pytest
from google.rpc.error_details_pb2 import BadRequest

from hycluster import errors
from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.ingress.status import rich_status


def fields(error: errors.HyclusterError, request: pb.GenerateRequest | pb.CountTokensRequest) -> list[str]:
    bad = BadRequest()
    for detail in rich_status(error, request).details:
        detail.Unpack(bad)
    return [violation.field for violation in bad.field_violations]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("sampling.top_p: 2 is not allowed", ["sampling.top_p"]),
        ("prompt, messages: exactly one must be set", ["prompt", "messages"]),
        # As the caller's own message has it, where a list that may be left out is a message with the list.
        ("messages[3].role: must not be empty", ["messages.messages[3].role"]),
        ("token_ids[0]: must be below 9", ["token_ids.ids[0]"]),
        ("n: 300 sequences are not allowed", ["sampling.n"]),
        ("lora_name: 'a' is the name of a model", []),
        ("a simulated engine only generates: from a prompt", []),
        ("prompt:no blank", []),
    ],
)
def test_fields_are_named_as_the_request_has_them(message: str, named: list[str]) -> None:
    assert fields(errors.InvalidInput(message), pb.GenerateRequest()) == named


def test_only_wrong_input_has_wrong_fields() -> None:
    assert fields(errors.Unavailable("model: 'a' has no replica"), pb.GenerateRequest()) == []
    assert fields(errors.InvalidInput("sampling.top_p: 2 is not allowed"), pb.CountTokensRequest()) == []
