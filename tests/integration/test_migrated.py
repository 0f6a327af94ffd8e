"""A request that changes replicas in its midst, on a real engine: it gets what it would have got undisturbed.

The gateway is made to believe that its replica is lost, and finds it again as a new one. Prefix caching is off, so what
a request brings along is computed anew each time, as on another replica.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from hycluster.adapters import AdapterEntry
from hycluster.directory.directory import Directory, ReplicaReport
from hycluster.replica.wire import EngineServer
from hycluster.settings.load import Admission, DataPlane, Router
from hycluster.settings.model import Model
from hycluster.settings.pool import Hardware

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

    from hycluster.engine.vllm import VllmEngine
    from hycluster.gateway.gateway import Gateway

# A first engine in a process imports what warns of third parties' sins.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180), pytest.mark.filterwarnings("ignore")]

PROMPT = [5 + i * 7 % 200 for i in range(40)]
TOKENS = 48
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "ages": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name"],
    "additionalProperties": False,
}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1, "seed": 3},
    "seeded with bounds": {"temperature": 0.8, "seed": 4, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    "penalties": {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.8, "repetition_penalty": 1.3},
    "logprobs": {"temperature": 0, "logprobs": 3},
    "logprobs of the prompt": {"temperature": 0, "prompt_logprobs": 2},
    "three of it": {"temperature": 1, "seed": 5, "n": 3},
    "bias": {"temperature": 0, "logit_bias": {70: 5.0, 71: 4.9}, "frequency_penalty": 0.5},
    "at least": {"temperature": 0, "min_tokens": 30, "stop_token_ids": list(range(60, 200)), "ignore_eos": False},
}


class Replica:
    """One real engine, in this process, behind real sockets."""

    def __init__(self, engine: VllmEngine, model: Model) -> None:
        self.engine = engine
        self.server = EngineServer(
            engine, replica_id="r", model=model.name, host="127.0.0.1", ports=DataPlane(host="127.0.0.1")
        )

    @property
    def report(self) -> ReplicaReport:
        return ReplicaReport(self.server.address, self.engine.load())


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    arguments: dict[str, Any] = {"max_model_len": 512, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    return Model(
        name="tiny",
        source=str(tiny_model),
        engine={**arguments, "enable_prefix_caching": False},
        hardware=Hardware(kv_cache_gib=0.0625),
    )


@pytest.fixture(scope="module")
def replica(model: Model) -> Iterator[Replica]:
    from hycluster.engine.vllm import VllmEngine

    replica = Replica(VllmEngine(model, model.source), model)
    yield replica
    replica.engine.shutdown()
    replica.server.close()


@asynccontextmanager
async def gateway_to(replica: Replica, model: Model) -> AsyncIterator[Gateway]:
    from hycluster.gateway.opening import open_gateway

    directory = Directory()

    async def sync(
        name: str, gateway_id: str, outstanding: dict[str, int], adapters: dict[str, AdapterEntry], *_: Any
    ) -> Any:
        directory.report(model, replica.report)
        return directory.sync(name, gateway_id, outstanding, adapters)

    asked: Any = SimpleNamespace(sync=SimpleNamespace(remote=sync))
    async with open_gateway(model, asked, router=Router(), admission=Admission(), wait_s=60) as gateway:
        yield gateway


async def lose(gateway: Gateway, replica: Replica) -> None:
    """Have the gateway take its replica for lost, and find another one, which is the same."""
    pool = gateway.engine_core
    for link in list(pool._members.links.values()):
        link.lose("the test says so", died=False)
    while not pool.able:
        await pool.update([replica.report])


_ids = itertools.count()


async def ask(gateway: Gateway, replica: Replica, cuts: list[int], **sampling: Any) -> list[RequestOutput]:
    """All outputs of a request whose replica is lost each time that it has so many tokens."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    defaults: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "output_kind": RequestOutputKind.DELTA}
    params = SamplingParams(**(defaults | sampling))
    (prompt,) = await gateway.renderer.render_cmpl_async([{"prompt_token_ids": PROMPT}])
    outputs, tokens, left = [], 0, sorted(cuts)
    async for output in gateway.generate(prompt, params, f"r{next(_ids)}"):
        outputs.append(output)
        tokens += sum(len(o.token_ids) for o in output.outputs)
        if left and tokens >= left[0] and not output.finished:
            while left and tokens >= left[0]:
                left.pop(0)
            await lose(gateway, replica)
    return outputs


def seen(outputs: list[RequestOutput]) -> dict[int, Any]:
    """By index, all that a caller is told in the end."""
    whole: dict[int, dict[str, Any]] = {}
    for output in outputs:
        for part in output.outputs:
            so_far = whole.setdefault(part.index, {"tokens": [], "text": "", "logprobs": []})
            so_far["tokens"] += part.token_ids
            so_far["text"] += part.text
            so_far["logprobs"] += [
                {token: (logprob.rank, logprob.decoded_token) for token, logprob in at.items()}
                for at in part.logprobs or ()
            ]
            so_far["values"] = part.cumulative_logprob
            so_far["end"] = (part.finish_reason, part.stop_reason)
    return whole


async def both(
    replica: Replica, model: Model, cuts: list[int], **sampling: Any
) -> tuple[dict[int, Any], dict[int, Any]]:
    """What is seen undisturbed, and with the replica lost."""
    async with gateway_to(replica, model) as gateway:
        undisturbed = await ask(gateway, replica, [], **sampling)
        disturbed = await ask(gateway, replica, cuts, **sampling)
        assert len(undisturbed[0].prompt_logprobs or ()) == len(disturbed[0].prompt_logprobs or ())
        assert undisturbed[-1].num_cached_tokens == disturbed[-1].num_cached_tokens
        assert not gateway.output_processor.has_unfinished_requests()
        assert gateway.engine_core.requests_in_flight == 0
        expected, got = seen(undisturbed), seen(disturbed)
        for index, sequence in expected.items():
            values, before = got[index].pop("values"), sequence.pop("values")
            assert (values is None) == (before is None)
            assert before is None or values == pytest.approx(before, rel=1e-4)
        return expected, got


@pytest.mark.parametrize("name", CASES)
async def test_nobody_notices(name: str, replica: Replica, model: Model) -> None:
    expected, got = await both(replica, model, [1, 2, 9, 20, 33], **CASES[name])
    assert got == expected
    assert all(len(sequence["tokens"]) > 20 for sequence in got.values())


async def test_wherever_the_cut_falls(replica: Replica, model: Model) -> None:
    """Also within a character of several bytes: each token of this model is a byte."""
    async with gateway_to(replica, model) as gateway:
        (expected,) = seen(await ask(gateway, replica, [], temperature=0)).values()
        assert any(ord(letter) > 127 and letter != "\ufffd" for letter in expected["text"])
        for cut in range(1, TOKENS):
            (got,) = seen(await ask(gateway, replica, [cut], temperature=0)).values()
            assert got["text"] == expected["text"], f"cut after {cut}"
            assert got["tokens"] == expected["tokens"], f"cut after {cut}"


async def test_a_cut_within_a_stop_string(replica: Replica, model: Model) -> None:
    async with gateway_to(replica, model) as gateway:
        (whole,) = seen(await ask(gateway, replica, [], temperature=0)).values()
        text = whole["text"]
        stop = next(text[at : at + 4] for at in range(12, len(text)) if text.index(text[at : at + 4]) == at)
        sampling: dict[str, Any] = {"temperature": 0, "stop": [stop]}
        (expected,) = seen(await ask(gateway, replica, [], **sampling)).values()
        assert expected["end"] == ("stop", stop)
        assert expected["text"] == text[: text.index(stop)]
        for cut in range(1, len(expected["tokens"])):
            (got,) = seen(await ask(gateway, replica, [cut], **sampling)).values()
            assert (got["text"], got["end"]) == (expected["text"], expected["end"]), f"cut after {cut}"


@pytest.mark.parametrize("seed", [1, 2])
async def test_structured_output_goes_on_exactly(seed: int, replica: Replica, model: Model) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    grammars = {
        "regex": (StructuredOutputsParams(regex=r"[a-z]{5}-[0-9]{12}(ab|cd){6}!"), r"[a-z]{5}-[0-9]{12}(ab|cd){6}!"),
        "json": (StructuredOutputsParams(json=SCHEMA), r"(?s)\{.*"),
        "choice": (StructuredOutputsParams(choice=["a long first choice", "a long second one"]), r"a long .*"),
    }
    for grammar, pattern in grammars.values():
        sampling: dict[str, Any] = {"temperature": 1, "seed": seed, "structured_outputs": grammar, "ignore_eos": False}
        expected, got = await both(replica, model, [1, 4, 11, 17], **sampling)
        assert got == expected
        assert re.fullmatch(pattern, got[0]["text"])
        if grammar.json and got[0]["end"][0] == "stop":
            json.loads(got[0]["text"])


async def test_many_at_once(replica: Replica, model: Model) -> None:
    """More than the engine takes at a time, so some wait, some prefill and some decode when it is lost."""
    async with gateway_to(replica, model) as gateway:
        kinds: list[dict[str, Any]] = [
            {"temperature": 1, "seed": seed, "max_tokens": 10 + 3 * seed} for seed in range(16)
        ]
        expected = await asyncio.gather(*(ask(gateway, replica, [], **kind) for kind in kinds))
        asking = [asyncio.create_task(ask(gateway, replica, [], **kind)) for kind in kinds]
        while not all(task.done() for task in asking):
            await asyncio.sleep(0.1)
            await lose(gateway, replica)
            # Long enough for some tokens of each.
            await asyncio.sleep(0.3)
        for before, task in zip(expected, asking, strict=True):
            got = seen(task.result())[0]
            assert got["tokens"] == seen(before)[0]["tokens"]
        assert gateway.engine_core.requests_in_flight == 0


async def test_requests_stand_still_while_the_engine_is_paused_or_sleeps(replica: Replica, model: Model) -> None:
    """What the control calls do to a real engine; over several replicas: ``tests/gateway/test_control_calls.py``."""
    async with gateway_to(replica, model) as gateway:
        (expected,) = seen(await ask(gateway, replica, [], temperature=0)).values()
        assert await gateway.reset_prefix_cache() is True
        await gateway.pause_generation(mode="keep")
        assert await gateway.is_paused() is True
        asking = asyncio.create_task(ask(gateway, replica, [], temperature=0))
        await asyncio.sleep(0.5)
        assert not asking.done()
        await gateway.resume_generation()
        assert await gateway.is_paused() is False
        (got,) = seen(await asking).values()
        assert got == expected
        # Level 0 leaves the memory as it is, which is all that a CPU has.
        await gateway.sleep(level=0, mode="keep")
        assert await gateway.is_sleeping() is True
        asking = asyncio.create_task(ask(gateway, replica, [], temperature=0))
        await asyncio.sleep(0.5)
        assert not asking.done()
        assert await gateway.wake_up(["scheduling"]) is True
        assert await gateway.is_sleeping() is False
        (got,) = seen(await asking).values()
        assert got == expected
