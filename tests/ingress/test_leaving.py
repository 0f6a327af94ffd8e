"""Ingress processes replaced on the same ports while callers connect, by an ordinary user: nobody is reset or
refused."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from bench.gateway import free_port
from hycluster.ingress.proto import inference_pb2, inference_pb2_grpc
from tests.ordinary_user import as_ordinary_user

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
REPLACED = 3
HTTP_CALLERS, GRPC_CALLERS = 8, 4
ASKED = b"GET / HTTP/1.1\r\nHost: ingress process\r\nConnection: close\r\n\r\n"


@contextlib.contextmanager
def open_ingress(ports: tuple[int, int]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.ingress.leaving_ingress", *map(str, ports)]
    with subprocess.Popen(
        as_ordinary_user(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
        process.stdin.close()


def over_http(port: int) -> str:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as caller:
            caller.sendall(ASKED)
            answer = b"".join(iter(lambda: caller.recv(4096), b""))
        return "answered" if b"\r\nhere\r\n" in answer else f"answer {answer!r}"
    except OSError as error:
        return repr(error)


def over_grpc(port: int) -> str:
    # A connection of its own, and nothing is tried again.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            inference_pb2_grpc.InferenceStub(channel).ListModels(inference_pb2.ListModelsRequest(), timeout=20)
        return "answered"
    except grpc.RpcError as error:
        return f"{error.code()} {error.details()}"


def test_nobody_is_lost() -> None:
    ports = free_port(), free_port()
    outcomes: Counter[tuple[str, str]] = Counter()
    ending = threading.Event()

    def keep_asking(way: str) -> None:
        while not ending.is_set():
            outcomes[way, over_http(ports[0]) if way == "HTTP" else over_grpc(ports[1])] += 1

    with contextlib.ExitStack() as stack:
        ingresses = [stack.enter_context(open_ingress(ports)) for _ in range(2)]
        with ThreadPoolExecutor(HTTP_CALLERS + GRPC_CALLERS) as pool:
            asking = [pool.submit(keep_asking, way) for way in ["HTTP"] * HTTP_CALLERS + ["gRPC"] * GRPC_CALLERS]
            try:
                for _ in range(REPLACED):
                    ingresses.append(stack.enter_context(open_ingress(ports)))
                    leaving = ingresses.pop(0)
                    assert leaving.stdin is not None
                    leaving.stdin.close()
                    assert leaving.wait(30) == 0
                # Whoever was told to come again has come.
                time.sleep(1.2)
            finally:
                ending.set()
            for one in asking:
                one.result()
    assert set(outcomes) == {("HTTP", "answered"), ("gRPC", "answered")}, outcomes
    assert outcomes["HTTP", "answered"] > 1000
