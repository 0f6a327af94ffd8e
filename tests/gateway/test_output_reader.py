"""Reading a socket by its descriptor: nothing stays behind, whatever came when."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import zmq

from hycluster.gateway.output_reader import MOST_AT_ONCE, OutputReader
from tests.waiting import until

MANY = 5 * MOST_AT_ONCE // 2


@pytest.fixture
def pair() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """One end to send by, and one to read."""
    context = zmq.Context()
    near, far = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    near.bind("inproc://outputs")
    far.connect("inproc://outputs")
    yield far, near
    context.destroy(linger=0)


async def test_all_arrives_in_order_that_came_before_and_while_it_is_read(
    pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]],
) -> None:
    far, near = pair
    heard: list[int] = []

    def hear(frames: list[zmq.Frame]) -> None:
        heard.append(int(bytes(frames[-1].buffer)))
        if heard[-1] < MANY:
            # Comes while this is read: the descriptor says nothing of it.
            far.send_multipart([b"frame", b"%d" % (heard[-1] + MANY)])

    for number in range(MANY):
        far.send_multipart([b"frame", b"%d" % number])
    reader = OutputReader(near, hear)
    await until(lambda: len(heard) == 2 * MANY)
    assert heard == list(range(2 * MANY))
    # Idle by now: the next ones are told by the descriptor.
    for number in range(2 * MANY, 2 * MANY + 3):
        far.send(b"%d" % number)
        await until(lambda: heard[-1] == number)  # noqa: B023
    reader.close()
    far.send(b"0")
    await asyncio.sleep(0)
    assert not reader.read()
    assert len(heard) == 2 * MANY + 3


async def test_a_message_that_is_wrong_keeps_none_behind_it(
    pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]],
) -> None:
    far, near = pair
    heard: list[bytes] = []
    wrong: list[BaseException] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: wrong.append(told["exception"]))

    def hear(frames: list[zmq.Frame]) -> None:
        heard.append(bytes(frames[0].buffer))
        if heard[-1] == b"wrong":
            raise ValueError(heard[-1])

    for said in (b"first", b"wrong", b"last"):
        far.send(said)
    reader = OutputReader(near, hear)
    await until(lambda: heard[-1:] == [b"last"])
    reader.close()
    assert heard == [b"first", b"wrong", b"last"]
    assert [str(error) for error in wrong] == ["b'wrong'"]
