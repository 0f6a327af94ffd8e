from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
import pytest_asyncio
import uvloop

from hycluster.ingress.grpc import GrpcIngress
from hycluster.ingress.proto import inference_pb2_grpc
from tests.ingress.stand_in import StandInGenerator, open_ingress

# What they test are the transports of an ingress process, which runs on this loop.
ON_UVLOOP = {"test_connection", "test_keep_alive", "test_odd_bytes", "test_tls"}


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"loop": uvloop.new_event_loop if item.path.stem in ON_UVLOOP else asyncio.new_event_loop}


@pytest.fixture
def stand_in() -> StandInGenerator:
    return StandInGenerator()


@pytest_asyncio.fixture
async def ingress(stand_in: StandInGenerator) -> AsyncIterator[GrpcIngress]:
    async with open_ingress(stand_in) as ingress:
        yield ingress


@pytest_asyncio.fixture
async def channel(ingress: GrpcIngress) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ingress.port}") as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> inference_pb2_grpc.InferenceAsyncStub:
    return inference_pb2_grpc.InferenceStub(channel)
