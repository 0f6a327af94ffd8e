from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from hycluster.engine import messages
from hycluster.engine.messages import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from hycluster.engine.protocol import Engine, EngineInfo
from hycluster.engine.simulated import SimulatedEngine
from hycluster.settings.simulated import Simulated
from tests.waiting import PATIENCE_S, eventually

# A message that doesn't come would block for ever.
pytestmark = pytest.mark.timeout(120)

Start = Callable[..., SimulatedEngine]


@pytest.fixture
def start() -> Iterator[Start]:
    engines: list[SimulatedEngine] = []

    def begin(**changes: Any) -> SimulatedEngine:
        engines.append(SimulatedEngine(Simulated(**{"realtime": False} | changes)))
        return engines[-1]

    yield begin
    for engine in engines:
        engine.shutdown()


def frames(request_id: str = "r", **params: Any) -> list[Any]:
    request = EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[1, 2, 3],
        sampling_params=messages.SamplingParams(**params),
        arrival_time=time.time(),
    )
    return messages.encode(request)


def receive(engine: Engine) -> tuple[int, EngineCoreOutputs]:
    message = engine.next_output()
    assert message is not None
    return message[0], messages.decode_outputs(message[1])


def finish(engine: Engine, requests: int) -> dict[tuple[int, str], list[EngineCoreOutput]]:
    """Read until this many requests have ended."""
    got: dict[tuple[int, str], list[EngineCoreOutput]] = {}
    while requests:
        client, message = receive(engine)
        for output in message.outputs:
            got.setdefault((client, output.request_id), []).append(output)
            requests -= output.finish_reason is not None
    return got


def test_requests_of_two_clients(start: Start) -> None:
    engine: Engine = start()
    for client in (0, 1):
        for name in "ab":
            engine.add(client, frames(name, max_tokens=5))
    got = finish(engine, 4)
    assert sorted(got) == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    texts = {tuple(token for output in outputs for token in output.new_token_ids) for outputs in got.values()}
    assert len(texts) == 1
    assert len(texts.pop()) == 5


def test_one_message_a_step_and_client(start: Start) -> None:
    engine = start(realtime=True, step_base_s=0.2)
    engine.add(0, frames("first", max_tokens=1))
    eventually(lambda: engine.load().waiting == 0)
    # Added within the first step, so all of these share the steps that follow.
    for number in range(6):
        engine.add(number % 2, frames(str(number), max_tokens=2))
    assert [len(receive(engine)[1].outputs) for _ in range(5)] == [1, 3, 3, 3, 3]


def test_info() -> None:
    engine = SimulatedEngine(Simulated(kv_blocks=10, block_size_tokens=8, max_model_len=64))
    engine.shutdown()
    assert engine.info == EngineInfo(max_model_len=64, kv_tokens=80, block_size=8)


def test_real_time_takes_the_modelled_time(start: Start) -> None:
    engine = start(realtime=True, step_base_s=0.02, prefill_token_s=0.0, decode_token_s=0.0)
    began = time.monotonic()
    engine.add(0, frames(max_tokens=5))
    finish(engine, 1)
    assert time.monotonic() - began >= 0.1


def test_unreadable_and_impossible_requests_are_answered(start: Start) -> None:
    engine = start()
    engine.add(0, [b"\xc1"])
    engine.add(0, [msgspec.msgpack.encode(["half", "not ids"])])
    engine.add(1, frames("logprobs", logprobs=1))
    # What is the request's own fault is said.
    for client, name, reason in ((0, "half", None), (1, "logprobs", "logprobs: a simulated engine has none")):
        got_client, message = receive(engine)
        assert got_client == client
        assert message.outputs == [
            EngineCoreOutput(request_id=name, new_token_ids=[], finish_reason=FinishReason.ERROR, stop_reason=reason)
        ]
    engine.add(0, frames("good", max_tokens=1))
    assert (0, "good") in finish(engine, 1)


def test_abort_frees_what_it_held(start: Start) -> None:
    engine = start(realtime=True, step_base_s=0.001)
    engine.add(0, frames("a", max_tokens=None))
    engine.add(1, frames("b", max_tokens=None))
    eventually(lambda: engine.load().running == 2)
    engine.abort(0, ["a", "unknown"])
    assert engine.load().running == 1
    engine.abort_client(1)
    assert (engine.load().running, engine.load().kv_usage) == (0, 0.0)


def test_calls_are_answered(start: Start) -> None:
    engine = start()
    engine.call(2, 7, "get_supported_tasks", ())
    engine.call(2, 8, "sleep", (1,))
    (_, good), (client, bad) = receive(engine), receive(engine)
    assert good.utility_output is not None
    assert good.utility_output.call_id == 7
    assert good.utility_output.result == (None, ["generate"])
    assert client == 2
    assert bad.utility_output is not None
    assert (bad.utility_output.call_id, bad.utility_output.result) == (8, None)
    assert "sleep" in (bad.utility_output.failure_message or "")


def test_of_a_probe_that_is_given_back_nobody_hears(start: Start) -> None:
    engine = start(realtime=True, step_base_s=60)
    engine.probe()
    eventually(lambda: engine.last_step_age_s is not None)
    engine.shutdown()
    assert engine.next_output() is None


def test_shutdown_wakes_the_reader_and_is_no_error(start: Start) -> None:
    engine = start(realtime=True, step_base_s=60)
    engine.add(0, frames())
    ends: list[Any] = []
    readers = [threading.Thread(target=lambda: ends.append(engine.next_output())) for _ in range(2)]
    for reader in readers:
        reader.start()
    eventually(lambda: engine.load().running == 1)
    engine.shutdown()
    for reader in readers:
        reader.join(PATIENCE_S)
    assert sorted(end is None for end in ends) == [False, True]
    # The other one was told that what is in work is given back.
    (told,) = [messages.decode_outputs(end[1]) for end in ends if end is not None]
    assert [(output.request_id, output.finish_reason) for output in told.outputs] == [("r", FinishReason.ABORT)]
    assert engine.next_output() is None
    assert engine.error is None


def test_a_killed_engine_says_of_what_it_died(start: Start) -> None:
    engine = start(realtime=True, step_base_s=60)
    engine.add(0, frames())
    error = RuntimeError("out of memory")
    engine.kill(error)
    assert engine.next_output() is None
    assert engine.error is error
    engine.shutdown()
    assert engine.error is error


def test_a_hanging_engine_shows_by_the_age_of_its_last_step(start: Start) -> None:
    engine = start()
    assert engine.last_step_age_s is None
    engine.add(0, frames(max_tokens=2))
    finish(engine, 1)
    eventually(lambda: engine.last_step_age_s is None)
    engine.hang()
    time.sleep(0.5)
    engine.add(0, frames())
    age = engine.last_step_age_s
    assert age is not None
    assert age < 0.5, "the clock starts with the work"
    eventually(lambda: (engine.last_step_age_s or 0) > 0.1)
    assert engine.load().waiting == 1
    engine.abort_client(0)
    assert engine.last_step_age_s is None
