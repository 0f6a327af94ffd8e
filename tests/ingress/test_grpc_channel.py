"""What the gRPC ingress and the client ask of gRPC's core, and what comes of it on real connections."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import re
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc

from hycluster import client
from hycluster.ingress import grpc as grpc_ingress
from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.ingress.proto import inference_pb2_grpc
from hycluster.settings.ingress import Grpc
from tests.ingress.stand_in import MODEL, StandInGenerator, open_ingress
from tests.waiting import PATIENCE_S, until

ASK = pb.GenerateRequest(model=MODEL, prompt="one two three", sampling=pb.Sampling(max_tokens=1))


def known_to_core() -> set[str]:
    """Every name of an argument that the installed core compares with; it takes any other one without a word."""
    with Path(cygrpc.__file__).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
        return {name.decode() for name in re.findall(rb"(grpc\.[a-z0-9_.]+)\0", library)}


def test_every_argument_is_one_that_grpc_knows() -> None:
    known = known_to_core()
    # It had its C macro's name, and no effect.
    assert "grpc.http2.min_recv_ping_interval_without_data_ms" not in known
    server, ours = grpc_ingress._options(Grpc(), True), client._options(True, 1 << 20)
    asked = {name for name, _ in server + ours}
    assert len(asked) >= 13
    assert asked - known == set()


def test_the_clients_pings_are_within_what_the_server_allows() -> None:
    server, ours = dict(grpc_ingress._options(Grpc(), True)), dict(client._options(False, 1 << 20))
    allowed = server["grpc.http2.min_ping_interval_without_data_ms"]
    # gRPC's clients of other languages have 10 s as their least.
    assert 2 * allowed <= min(10_000, ours["grpc.keepalive_time_ms"])


async def test_a_call_that_is_silent_for_long_is_not_cut_off_for_its_clients_pings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gRPC ends a connection with "Too many pings" at the fifth that comes too soon. Its clients wait 1 s between two
    at the least."""
    monkeypatch.setattr(grpc_ingress, "PINGS_AT_LEAST_MS", 500)
    pinging = [
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    stand_in = StandInGenerator()
    stand_in.pause_s = 6.5

    async def texts(channel: grpc.aio.Channel) -> list[str]:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        return [chunk.text async for chunk in stub.GenerateStream(ASK)]

    async with open_ingress(stand_in) as ingress, contextlib.AsyncExitStack() as stack:
        calls = []
        for own in (pinging, [*pinging, ("grpc.keepalive_permit_without_calls", 1)]):
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{ingress.port}", own)
            calls.append(texts(await stack.enter_async_context(channel)))
        assert await asyncio.gather(*calls) == [["w0 "], ["w0 "]]


async def test_connections_over_the_bound_are_told_so_and_silent_ones_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 silent ones took all file descriptors, and callers waited."""
    monkeypatch.setattr(grpc_ingress, "HANDSHAKE_S", 1.0)
    stand_in = StandInGenerator()
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with open_ingress(stand_in, max_connections=5) as ingress:
        target = f"127.0.0.1:{ingress.port}"
        async with grpc.aio.insecure_channel(target, own) as early:
            here: Any = inference_pb2_grpc.InferenceStub(early)
            await here.Generate(ASK)
            silent = [socket.create_connection(("127.0.0.1", ingress.port)) for _ in range(50)]
            await asyncio.sleep(0.3)
            async with grpc.aio.insecure_channel(target, own) as late:
                stub: Any = inference_pb2_grpc.InferenceStub(late)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Generate(ASK, timeout=PATIENCE_S)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                # Whoever is in is served meanwhile.
                await here.Generate(ASK)
                await until(lambda: all(map(ended, silent)))
                await stub.Generate(ASK, timeout=PATIENCE_S, wait_for_ready=True)
    for sock in silent:
        sock.close()


def ended(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1024) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_the_bound_leaves_file_descriptors_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, 256))
    assert dict(grpc_ingress._options(Grpc(), True))["grpc.max_allowed_incoming_connections"] == 64
