"""Processes of their own: the directory's book behind a socket, or a process that callers come to.

    python -m tests.limits.apart book PORT
    python -m tests.limits.apart process PORT FILE REQUESTS_PER_MINUTE OFFERED_PER_S

A process writes a byte into its file for each request that it lets in.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import random
import struct
import sys
from pathlib import Path
from typing import Any

from hycluster.auth.limits import Limit
from hycluster.errors import HyclusterError
from hycluster.limits.book import LeaseBook
from hycluster.limits.limiter import Limiter, following
from hycluster.limits.reservation import RequestTokens
from tests.limits.virtual import ME, Counts

_SIZE = struct.Struct("!I")


async def _read(reader: asyncio.StreamReader) -> Any:
    (size,) = _SIZE.unpack(await reader.readexactly(_SIZE.size))
    return pickle.loads(await reader.readexactly(size))


def _packed(told: Any) -> bytes:
    body = pickle.dumps(told)
    return _SIZE.pack(len(body)) + body


async def keep_book(port: int) -> None:
    """Until killed."""
    book = LeaseBook()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                writer.write(_packed(book.lease(*await _read(reader))))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    await server.serve_forever()


async def be_asked(port: int, file: Path, per_minute: int, per_s: float) -> None:
    """Until killed."""
    line: list[Any] = []

    async def lease(*asked: Any) -> Any:
        try:
            line[:] = line or await asyncio.open_connection("127.0.0.1", port)
            line[1].write(_packed(asked))
            return await _read(line[0])
        except BaseException:
            line.clear()
            raise

    limits = (Limit("acme", requests_per_minute=per_minute),)
    admitted = file.open("ab", buffering=0)
    async with following(Limiter(lambda: limits, lease, Counts())) as limiter, asyncio.TaskGroup() as group:

        async def ask() -> None:
            with contextlib.suppress(HyclusterError):
                reservation = await limiter.reserve(limiter.concerning(ME, "m"), RequestTokens(1))
                admitted.write(b"1")
                await asyncio.sleep(0.1)
                reservation.end()

        while True:
            await asyncio.sleep(random.expovariate(per_s))
            group.create_task(ask())


if __name__ == "__main__":
    kind, port, *rest = sys.argv[1:]
    if kind == "book":
        asyncio.run(keep_book(int(port)))
    else:
        asyncio.run(be_asked(int(port), Path(rest[0]), int(rest[1]), float(rest[2])))
