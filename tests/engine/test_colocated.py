"""Online beside bulk on a real engine, in this process: who goes first, and that nobody's tokens change by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hycluster.core import ColocationLoad, Priority
from hycluster.settings.model import Colocation, Model
from hycluster.settings.pool import Hardware

if TYPE_CHECKING:
    from hycluster.engine.vllm import VllmEngine

# A first engine in a process imports what warns of third parties' sins.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.filterwarnings("ignore")]

SLOTS, CHUNK_TOKENS, KV_TOKENS = 8, 64, 1024
# A token of the tiny model in the KV cache: 2 layers x 2 (K, V) x 2 heads x 32 channels x 4 bytes.
KV_GIB = KV_TOKENS * 1024 / 2**30
BULK = {
    f"bulk-{number}": ([3 + (number * 37 + i * 11) % 250 for i in range(20 + 17 * number)], 40) for number in range(8)
}
ONLINE = {f"online-{number}": ([3 + (number * 91 + i * 7) % 250 for i in range(70)], 16) for number in range(SLOTS)}
# Long enough to be there still when the others come.
LATER = {f"later-{number}": ([3 + (number * 53 + i * 5) % 250 for i in range(40)], 60) for number in range(3)}


@dataclass
class Heard:
    """What an engine said: by request, its tokens; and who was in each of its steps."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    steps: list[set[str]] = field(default_factory=list)
    over: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[VllmEngine]:
    from hycluster.engine.vllm import VllmEngine

    model = Model(
        name="tiny",
        source=str(tiny_model),
        engine={
            "max_model_len": 512,
            "max_num_batched_tokens": CHUNK_TOKENS,
            "max_num_seqs": SLOTS,
        },
        hardware=Hardware(kv_cache_gib=KV_GIB),
        # A step with online work takes no bulk: what is in a step can then be said.
        colocation=Colocation(max_slowdown=0.0, max_step_s=0.02),
    )
    engine = VllmEngine(model, model.source)
    yield engine
    engine.shutdown()


def load(engine: VllmEngine) -> ColocationLoad:
    found = engine.load().colocation
    assert found is not None, "it is on by default"
    return found


def add(engine: VllmEngine, requests: Mapping[str, tuple[list[int], int]], priority: Priority) -> None:
    for name, (prompt, tokens) in requests.items():
        engine.ask(1, name, prompt, tokens, priority)


def hear(engine: VllmEngine, heard: Heard, *until: str, tokens: int | None = None) -> None:
    """Until these are over, or one of them has so many tokens."""
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder

    decoder = MsgpackDecoder(EngineCoreOutputs)
    while not (set(until) <= heard.over or (tokens and any(len(heard.tokens.get(one, ())) >= tokens for one in until))):
        message = engine.next_output()
        assert message is not None, engine.error
        outputs = decoder.decode(message[1]).outputs
        for output in outputs:
            heard.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finish_reason is not None:
                heard.over.add(output.request_id)
        if outputs:
            heard.steps.append({output.request_id for output in outputs if output.new_token_ids})


@pytest.fixture(scope="module")
def alone(engine: VllmEngine) -> dict[str, list[int]]:
    """Everybody's tokens, kind after kind."""
    heard = Heard()
    for requests in (BULK, ONLINE, LATER):
        add(engine, requests, Priority.ONLINE)
        hear(engine, heard, *requests)
    return heard.tokens


@pytest.mark.parametrize("begun", [1, 25], ids=["in prompts", "in midst"])
def test_rows_that_were_parked_and_given_up_say_the_same(
    engine: VllmEngine, alone: dict[str, list[int]], begun: int
) -> None:
    heard = Heard()
    add(engine, BULK, Priority.BATCH)
    hear(engine, heard, *BULK, tokens=begun)
    add(engine, LATER, Priority.ONLINE)
    hear(engine, heard, *LATER, tokens=2)
    parked = load(engine)
    add(engine, ONLINE, Priority.ONLINE)
    hear(engine, heard, *LATER, *ONLINE)
    served = load(engine)
    hear(engine, heard, *BULK)
    assert heard.tokens == alone
    assert parked.parked > 0
    # All slots are taken by online rows, and while one of them is there no bulk row gets one: each that had one leaves,
    # once.
    assert served.given_up - parked.given_up == parked.bulk_running > 0
    assert load(engine).bulk_running == load(engine).bulk_waiting == 0


def test_no_bulk_row_is_in_a_step_with_an_online_one(engine: VllmEngine) -> None:
    heard = Heard()
    add(engine, BULK, Priority.BATCH)
    hear(engine, heard, *BULK, tokens=5)
    begun = len(heard.steps)
    add(engine, LATER, Priority.ONLINE)
    hear(engine, heard, *LATER)
    steps = heard.steps[begun:]
    assert not [step for step in steps if step & LATER.keys() and step & BULK.keys()]
    # Of the step that was going on, and of one that had been scheduled before the request was read.
    assert len([step for step in steps if step & BULK.keys()]) <= 2
    hear(engine, heard, *BULK)


def test_what_it_measured(engine: VllmEngine) -> None:
    now = load(engine)
    assert 0 < now.predicted_step_s < 30
    assert 0 < now.real_step_s < 30
    assert min(now.bulk_tokens, now.online_tokens) > 1000
