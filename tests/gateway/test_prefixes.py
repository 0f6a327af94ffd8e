"""What a gateway predicts of vLLM's own scheduler and KV cache manager, in virtual time, and what these then find."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hycluster.core import Priority
from hycluster.engine.protocol import EngineInfo
from hycluster.observe.prefixes import PrefixAudit
from tests.engine.test_cached_blocks import conversations
from tests.engine.test_scheduler import Case, make_case
from tests.gateway.test_block_names import request

if TYPE_CHECKING:
    from hycluster.gateway.prefixes import Prefixes

pytestmark = pytest.mark.usefixtures("vllm_imported")


class Followed:
    """Engines, and a gateway that follows their blocks."""

    def __init__(self, folder: Path, replicas: int = 1, **named: Any) -> None:
        from hycluster.gateway.prefixes import Prefixes

        self.prefixes: Prefixes = Prefixes()
        self.folder, self.named = folder, named
        self.replicas: dict[str, tuple[Case, Any, Any]] = {}
        self.sent: dict[str, Any] = {}
        self.count = 0
        for number in range(replicas):
            self.start(f"r{number}")

    def start(self, replica: str) -> None:
        from hycluster.engine.cached_blocks import block_naming, cached_blocks

        case = make_case(self.folder, **self.named)
        blocks, naming = cached_blocks(case.engine.scheduler), block_naming(case.engine.scheduler)
        assert blocks is not None
        assert naming is not None
        room = naming.tokens * case.engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks
        info = EngineInfo(4096, room, naming.tokens, blocks=naming)
        self.replicas[replica] = case, blocks, info
        self.prefixes.hear(replica, info, blocks.follow(1))

    def lose(self, replica: str) -> None:
        self.prefixes.forget(replica)
        del self.replicas[replica]

    def send(self, replica: str, prompt: list[int], tokens: int = 4, priority: Priority = Priority.ONLINE) -> str:
        self.count += 1
        name = f"{replica}-{self.count}"
        prefix = self.sent[name] = self.prefixes.of(request(request_id=name, prompt_token_ids=prompt))
        assert prefix is not None
        self.prefixes.send(prefix, replica)
        self.prefixes.finish(prefix, request(request_id=name, prompt_token_ids=prompt))
        self.replicas[replica][0].engine.add(name, prompt, tokens, int(priority))
        return name

    def step(self, replica: str) -> None:
        case, blocks, info = self.replicas[replica]
        if not case.engine.has_work:
            return
        said = case.engine.step()
        if (frame := blocks.changes()) is not None:
            self.prefixes.hear(replica, info, frame)
        for token in said:
            if (prefix := self.sent.pop(token.request_id, None)) is not None:
                found: Any = SimpleNamespace(num_local_cached_tokens=token.cached)
                self.prefixes.begun(prefix, found)
            if token.last:
                self.sent.pop(token.request_id, None)

    def finish(self) -> None:
        for replica, (case, _, _) in self.replicas.items():
            while case.engine.has_work:
                self.step(replica)

    @property
    def audit(self) -> PrefixAudit:
        return self.prefixes.audit


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_after_the_other_it_is_exact(tiny_model: Path, asynchronous: bool) -> None:
    """With evictions, replicas that go and come, and resets among them."""
    chance = random.Random(11)
    followed = Followed(tiny_model, 3, blocks=100, asynchronous=asynchronous)
    for number, prompt in enumerate(conversations(chance, 600)):
        followed.send(chance.choice([*followed.replicas]), prompt, chance.randrange(1, 40))
        followed.finish()
        if number % 100 == 99:
            followed.lose(chance.choice([*followed.replicas]))
            followed.start(f"later{number}")
        elif number % 100 == 49:
            case, blocks, info = followed.replicas[chance.choice([*followed.replicas])]
            case.engine._flights.clear()
            assert case.engine.scheduler.reset_prefix_cache()
            replica = next(name for name, (each, _, _) in followed.replicas.items() if each is case)
            followed.prefixes.hear(replica, info, blocks.changes())
    audit = followed.audit
    assert (audit.predictions, audit.missing_tokens, audit.unforeseen_tokens) == (600, 0, 0)
    assert audit.cached_tokens > 5_000


def test_what_waits_is_counted_on(tiny_model: Path) -> None:
    """A burst with one beginning: nobody has said anything of its blocks when the others are sent."""
    followed = Followed(tiny_model)
    shared = [7 * i % 250 for i in range(320)]
    for number in range(12):
        followed.send("r0", [*shared, number, *shared[:number]])
    followed.finish()
    audit = followed.audit
    assert (audit.predictions, audit.missing_tokens, audit.unforeseen_tokens) == (12, 0, 0)
    assert audit.cached_tokens == 11 * 320
    assert followed.prefixes._awaited["r0"] == {}


def test_beside_each_other_it_is_exact_while_nothing_is_evicted(tiny_model: Path) -> None:
    chance = random.Random(12)
    followed = Followed(tiny_model, 2, blocks=20_000)
    for prompt in conversations(chance, 600):
        followed.send(chance.choice(["r0", "r1"]), prompt, chance.randrange(1, 30))
        for replica in ("r0", "r1"):
            while chance.random() < 0.6:
                followed.step(replica)
    followed.finish()
    audit = followed.audit
    assert audit.predictions == 600
    assert (audit.missing_tokens, audit.unforeseen_tokens) == (0, 0)
    assert audit.cached_tokens > 10_000


def test_what_is_evicted_meanwhile_is_missing(tiny_model: Path) -> None:
    """What vLLM itself makes inexact: blocks that were there when a request was sent go to one before it."""
    followed = Followed(tiny_model, blocks=40, engine={"max_num_seqs": 1, "max_num_batched_tokens": 1024})
    first, other = [3] * 320, [5] * 500
    followed.send("r0", first)
    followed.finish()
    followed.send("r0", other)
    followed.send("r0", first)
    followed.finish()
    # Of 39 blocks 20 had the first one, and 32 went to the other: 7 are left, of 19 that it may find.
    assert (followed.audit.missing_tokens, followed.audit.unforeseen_tokens) == (12 * 16, 0)


def test_of_what_nobody_has_only_the_begin_is_named_before_it_is_sent(tiny_model: Path) -> None:
    """What is predicted is the same, and what comes behind it counts on all of it."""
    followed = Followed(tiny_model)
    chance = random.Random(3)
    prompt = [chance.randrange(250) for _ in range(6400)]
    asked = request(prompt_token_ids=prompt)
    new = followed.prefixes.of(asked)
    assert new is not None
    assert len(new.names) < 0.4 * new.blocks == 0.4 * 400
    followed.prefixes.send(new, "r0")
    followed.prefixes.finish(new, asked)
    assert len(new.names) == 400 == len(followed.prefixes._awaited["r0"])
    behind = followed.prefixes.of(request(prompt_token_ids=[*prompt, *prompt[:999]]))
    assert behind is not None
    assert behind.expected.tolist() == [400]
    followed.prefixes.let_go(new)
    assert not followed.prefixes._awaited["r0"]
    # One that is not there any more when its blocks get their names is not counted on.
    other = followed.prefixes.of(request(prompt_token_ids=prompt[::-1]))
    assert other is not None
    followed.prefixes.send(other, "r0")
    followed.prefixes.let_go(other)
    followed.prefixes.finish(other, request(prompt_token_ids=prompt[::-1]))
    assert not followed.prefixes._awaited["r0"]


def test_one_that_is_left_is_no_longer_counted_on(tiny_model: Path) -> None:
    followed = Followed(tiny_model)
    prompt = [3] * 320
    name = followed.send("r0", prompt)
    followed.replicas["r0"][0].engine.scheduler.finish_requests(name, _aborted())
    followed.prefixes.let_go(followed.sent.pop(name))
    followed.send("r0", prompt)
    followed.finish()
    assert (followed.audit.predictions, followed.audit.missing_tokens) == (1, 0)


def _aborted() -> Any:
    from vllm.v1.request import RequestStatus

    return RequestStatus.FINISHED_ABORTED


def test_nothing_is_predicted_of_a_replica_that_has_said_nothing(tiny_model: Path) -> None:
    followed = Followed(tiny_model)
    prefix = followed.prefixes.of(request())
    assert prefix is not None
    assert followed.prefixes.seen(prefix, ["new"]) is None
    seen = followed.prefixes.seen(prefix, ["r0", "new"])
    assert seen is not None
    assert [column.tolist() for column in seen] == [[0.0, 0.0], [math.inf, math.inf]]
    followed.prefixes.send(prefix, "new")
    followed.prefixes.begun(prefix, None)
    assert followed.audit.predictions == 0
    followed.lose("r0")
    assert followed.prefixes.of(request()) is None
    assert followed.prefixes.blocks == 0


def test_who_has_each_token_computed_is_predicted_none(tiny_model: Path) -> None:
    from vllm.sampling_params import SamplingParams

    followed = Followed(tiny_model)
    prompt = [3] * 100
    followed.send("r0", prompt)
    followed.finish()
    asked = request(prompt_token_ids=prompt, sampling_params=SamplingParams(prompt_logprobs=0))
    for each, tokens in ((request(prompt_token_ids=prompt), 96), (asked, 0)):
        prefix = followed.prefixes.of(each)
        assert prefix is not None
        seen = followed.prefixes.seen(prefix, ["r0"])
        assert seen is not None
        assert seen[0].tolist() == [tokens]


def test_drafting_computes_the_last_block_again() -> None:
    from hycluster.engine.protocol import BlockNaming
    from hycluster.gateway.prefixes import Prefix

    prefix = Prefix(np.arange(4, dtype=np.uint64), BlockNaming(16, "sha256", b"", computed_again=1), readable=3)
    assert [prefix.tokens(blocks) for blocks in range(5)] == [0, 0, 16, 32, 32]


def test_what_would_go_next_is_the_older_the_slower_a_replica_drops(tiny_model: Path) -> None:
    followed, now = Followed(tiny_model, 2, blocks=100), [0.0]
    followed.prefixes.clock = lambda: now[0]
    for number in range(60):
        now[0] = float(number)
        followed.send("r0", [number] * 320)
        if number % 3 == 0:
            followed.send("r1", [number] * 320)
        followed.finish()
    prefix = followed.prefixes.of(request())
    assert prefix is not None
    seen = followed.prefixes.seen(prefix, ["r0", "none", "r1"])
    assert seen is not None
    often, none, rarely = seen[1].tolist()
    # 99 blocks hold the last 5 of one a second, and of one in three.
    assert 3 < often < 10
    assert 9 < rarely < 30
    assert none == math.inf


@pytest.mark.parametrize(
    ("tokens", "block"), [(10, None), (16, 0), (500, 0), (513, 31), (1023, 31), (1024, 63), (2000, 63)]
)
def test_a_conversation_begins_as_it_began(tokens: int, block: int | None) -> None:
    from hycluster.engine.protocol import BlockNaming
    from hycluster.gateway.prefixes import Prefix

    names = np.arange(tokens // 16, dtype=np.uint64)
    assert Prefix(names, BlockNaming(16, "sha256", b""), readable=0).begin == block
