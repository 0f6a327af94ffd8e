"""What a call by gRPC says of its request, and which trace that is in; with a stand-in for the pool behind it."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
import pytest

from hycluster.client import AsyncClient
from hycluster.errors import Unavailable
from hycluster.ingress.grpc import GrpcIngress
from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.observe import timelines
from hycluster.observe.spans import spans_of
from hycluster.observe.timelines import Recorder
from hycluster.timeline import Timeline
from hycluster.trace_context import TraceContext
from tests.ingress.stand_in import MODEL, StandInGenerator

Stub = Any  # InferenceAsyncStub exists for the type checker only


def ask(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=MODEL, prompt="one two three", **fields)


async def test_every_call_ends_with_its_id(stub: Stub, stand_in: StandInGenerator) -> None:
    async def ended(call: Any) -> str:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call
        (said,) = [value for name, value in await call.trailing_metadata() if name == "x-request-id"]
        return str(said)

    assert await ended(stub.Generate(ask(request_id="mine"))) == "mine"
    assert await ended(stub.Generate(ask(), metadata=(("x-request-id", "by-metadata"),))) == "by-metadata"
    assert [request.request_id for request, _ in stand_in.requests] == ["mine", "by-metadata"]
    made = [await ended(stub.Generate(ask())), await ended(stub.ListModels(pb.ListModelsRequest()))]
    assert all(name.startswith("gen-") for name in made)
    # What metadata can't hold is said otherwise, and what fails says it too.
    assert await ended(stub.Generate(ask(request_id="ä\n"))) == "%C3%A4%0A"
    stand_in.error = Unavailable("away")
    assert await ended(stub.Generate(ask(request_id="failed"))) == "failed"


async def test_a_call_is_a_part_of_its_callers_trace(
    ingress: GrpcIngress, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(timelines, "recorder", recorder)
    recorder.samples = lambda _, parent: parent is not None and parent.sampled
    ended: list[Timeline] = []
    recorder.ended.append(ended.append)
    said = f"00-{7:032x}-{9:016x}-01"
    await stub.Generate(ask(), metadata=(("traceparent", said),))
    async with AsyncClient(f"127.0.0.1:{ingress.port}") as client:
        with timelines.Carried("row", "row", TraceContext(5, 6, True)) as row:
            await client.generate(MODEL, prompt="a b c", max_tokens=2)
        await client.generate(MODEL, prompt="a b c", max_tokens=2)
    first, asked, _, last = ended
    assert (first.operation, first.trace_id, first.parent) == ("grpc Generate", 7, TraceContext(7, 9, True))
    # The ingress' part of a row's trace is below the row's call, which is below the row's.
    (root, _, call) = spans_of(row)
    assert (root.kind, call.kind, call.name, call.parent) == ("INTERNAL", "CLIENT", "call", row.span_id)
    assert (asked.trace_id, asked.parent) == (5, TraceContext(5, call.span_id, True))
    assert last.parent is None
    assert not last.sampled


@pytest.mark.parametrize("recorded", [True, False])
async def test_what_asks_by_the_client_passes_its_trace_on(
    ingress: GrpcIngress, stand_in: StandInGenerator, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """A job's row, be it recorded in the job's process or not: the service may record where the job does not."""
    recorder = Recorder()
    monkeypatch.setattr(timelines, "recorder", recorder)
    ended: list[Timeline] = []
    recorder.ended.append(ended.append)
    parent = TraceContext(5, 6, True, "vendor=1")
    async with AsyncClient(f"127.0.0.1:{ingress.port}") as client:
        with timelines.Carried("row", "row", parent) as row:
            row.sampled = recorded
            await client.generate(MODEL, prompt="a b c", max_tokens=2)
            async for _ in client.stream(MODEL, prompt="a b c", max_tokens=2):
                pass
    whole, streamed = ended[:2]
    calls = [int(event.attributes["span_id"], 16) for event in row.events if event.name == "called"]
    assert len(calls) == 2 * recorded
    above = [TraceContext(5, call, True, "vendor=1") for call in calls] if recorded else [parent, parent]
    assert [(asked.trace_id, asked.parent) for asked in (whole, streamed)] == [(5, each) for each in above]
