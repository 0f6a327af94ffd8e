"""Both ingresses in a process of their own, over the stand-in, on given ports: opens, and leaves as ``IngressProcess``
does."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvicorn

from hycluster.ingress.grpc import serve_grpc
from hycluster.ingress.ports import TURNED_AWAY_AFTER_S, bind, let_in, turn_away
from hycluster.settings.ingress import Grpc
from tests.ingress.stand_in import StandInGenerator


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"here"})


async def main(http: int, grpc: int) -> None:
    ingress = await serve_grpc(StandInGenerator(), Grpc(port=grpc), reuse_port=True)
    server = uvicorn.Server(uvicorn.Config(answer, log_config=None, access_log=False, lifespan="off"))
    serving = asyncio.create_task(
        server.serve(sockets=[bind("127.0.0.1", http, "http.port", reuse_port=True)]),
    )
    while not server.started:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.01)
    print("open", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    turn_away(http, grpc)
    await let_in((http, grpc), TURNED_AWAY_AFTER_S)
    server.should_exit = True
    await asyncio.gather(serving, ingress.stop(20), let_in((http, grpc), TURNED_AWAY_AFTER_S))


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
