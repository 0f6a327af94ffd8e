"""An engine by its counts: the steps that vLLM's scheduler would make, without vLLM.

Prompts in the order in which they come, in chunks of what a step has room for beside the rows that decode; as many rows
as there is KV cache for. Steps in which rows only decode, until one ends or somebody comes, are one jump: their time is
linear in the KV cache that they read. A row has room for its output from its begin, so none is preempted.
``tests/simulate/test_counted_pool.py`` holds it against vLLM's own scheduler.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hycluster.engine.step_time import StepWork, prefill_pairs
from hycluster.simulate.counted_cache import CountedCache
from hycluster.simulate.step_work import StepSeconds
from hycluster.simulate.traces import HASH_TOKENS

# What an engine says of itself, in this order: tokens to prefill or to decode, requests, tokens of prompts to compute,
# rows that decode, tokens of KV cache that its requests have or will have; when the step that goes on began, and by how
# many tokens a second the first and the third have become fewer since.
COLUMNS = 8


@dataclass(slots=True)
class CountedRow:
    """A request in an engine.

    Attributes:
        number: whatever its owner knows it by.
        blocks: whole ones of its prompt, by a trace's ids.
        expected: tokens of its prompt that are to be computed, as its router thinks.
        cached: tokens of the prompt that were there.
        computed: of the prompt, so far, those among them.
    """

    number: int
    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[int]
    arrival_s: float
    expected: float
    cached: int = 0
    computed: int = 0

    @property
    def to_prefill(self) -> int:
        return self.prompt_tokens - self.computed

    def nameless_tokens(self, block_tokens: int) -> int:
        """What it takes beside its blocks."""
        context = self.prompt_tokens + self.output_tokens
        return -(-context // block_tokens) * block_tokens - len(self.blocks) * HASH_TOKENS


@dataclass(frozen=True, slots=True)
class CountedSizes:
    """What bounds a step.

    Attributes:
        step_tokens, step_rows: of a step, at most.
        kv_tokens: that the KV cache holds.
        block_tokens: what a row takes is a multiple of it.
        asynchronous: a step is scheduled when the one before begins.
        prefix_caching: what a request computed is kept for the next one.
    """

    step_tokens: int
    step_rows: int
    kv_tokens: int
    block_tokens: int
    asynchronous: bool
    prefix_caching: bool = True


class CountedEngine:
    """One engine; whoever calls ``add`` and ``finish_step`` owns the time.

    Attributes:
        next_s: when the step that is computed is over; infinite if there is none.
        over_s: when the last one was.
        steps, busy_s: how many steps were computed, and for how long.
    """

    def __init__(
        self,
        sizes: CountedSizes,
        step_time: StepSeconds,
        stored: Callable[[int], None],
        dropped: Callable[[int], None],
    ) -> None:
        self.cache = CountedCache(sizes.kv_tokens, stored, dropped)
        self.next_s = math.inf
        self.steps, self.busy_s, self.over_s = 0, 0.0, 0.0
        self._sizes, self._step_time = sizes, step_time
        self._waiting: deque[CountedRow] = deque()
        self._prefilling: list[CountedRow] = []
        # Those that decode, by the count of steps at which they end.
        self._ending: list[tuple[int, int, CountedRow]] = []
        self._order = itertools.count()
        self._decoded = self._decoding = self._kv_tokens = 0
        self._outstanding = self._asked = self._prompts_left = 0
        self._to_prefill = 0.0
        # The step that is computed: when it began and when the one before did; how many of them are a jump, 0 if no row
        # decodes; chunks of prompts.
        self._begun_s = self._before_s = -math.inf
        self._jump = 0
        self._chunks: list[tuple[CountedRow, int]] = []

    def columns(self) -> tuple[float, ...]:
        """See ``COLUMNS``."""
        took_s = self.next_s - self._begun_s
        pace = prefill_pace = 0.0
        if 0 < took_s < math.inf:
            prefill_pace = sum(tokens for _, tokens in self._chunks) / took_s
            pace = self._decoding * self._jump / took_s
        return (
            self._outstanding, self._asked, self._to_prefill, self._decoding,
            self._kv_tokens + self._prompts_left, self._begun_s, pace, prefill_pace,
        )  # fmt: skip

    def add(self, row: CountedRow, now_s: float) -> None:
        """Queue a request."""
        self._waiting.append(row)
        self._outstanding += row.prompt_tokens + row.output_tokens
        self._asked += 1
        self._prompts_left += row.prompt_tokens
        self._to_prefill += row.expected
        if math.isinf(self.next_s):
            self._before_s = now_s
            self._begin(now_s)
        elif self._jump > 1:
            self._cut(now_s)

    def finish_step(self) -> tuple[list[CountedRow], list[CountedRow]]:
        """The step that is computed is over; the next one begins.

        Returns:
            Those that got their first token, and those that got their last one.
        """
        now_s = self.over_s = self.next_s
        first, last = list[CountedRow](), list[CountedRow]()
        # When the last one of a jump began.
        self._before_s = self._begun_s + (self._jump_s(self._jump - 1) if self._jump > 1 else 0.0)
        self._decoded += self._jump
        self._kv_tokens += self._decoding * self._jump
        self._outstanding -= self._decoding * self._jump
        while self._ending and self._ending[0][0] <= self._decoded:
            row = heapq.heappop(self._ending)[2]
            self._decoding -= 1
            self._kv_tokens -= row.prompt_tokens + row.output_tokens - 1
            last.append(row)
        for row, tokens in self._chunks:
            row.computed += tokens
            self._to_prefill -= tokens
            if row.to_prefill:
                continue
            self._prefilling.remove(row)
            self._outstanding -= row.prompt_tokens + 1
            self._prompts_left -= row.prompt_tokens
            first.append(row)
            if row.output_tokens == 1:
                last.append(row)
            else:
                heapq.heappush(self._ending, (self._decoded + row.output_tokens - 1, next(self._order), row))
                self._decoding += 1
                self._kv_tokens += row.prompt_tokens
        for row in last:
            self._asked -= 1
            self.cache.let_go(row.blocks, row.nameless_tokens(self._sizes.block_tokens))
        self._begin(now_s)
        return first, last

    def _begin(self, now_s: float) -> None:
        """Schedule the next step, or as many as are alike."""
        sizes = self._sizes
        self._begun_s, self._jump, self._chunks = now_s, 0, []
        budget = sizes.step_tokens - self._decoding
        for row in self._prefilling:
            budget -= self._chunk(row, budget)
        while self._waiting and budget > 0 and self._decoding + len(self._prefilling) < sizes.step_rows:
            row = self._waiting[0]
            if self._comes_too_late(row, now_s) or not self._admit(row):
                break
            self._prefilling.append(self._waiting.popleft())
            budget -= self._chunk(row, budget)
        if self._chunks:
            steps, self._jump = 1, min(1, self._decoding)
            took_s = self._step_time(self._work())
        elif self._decoding:
            # One that came too late for this step is looked at before the next.
            late = bool(self._waiting) and self._comes_too_late(self._waiting[0], now_s)
            steps = self._jump = 1 if late else self._ending[0][0] - self._decoded
            took_s = self._jump_s(steps)
        elif self._waiting:
            # Nothing is computed, so it has not come too late for anything.
            self._before_s = now_s
            self._begin(now_s)
            return
        else:
            self.next_s = math.inf
            return
        self.next_s = now_s + took_s
        self.steps += steps
        self.busy_s += took_s

    def _comes_too_late(self, row: CountedRow, now_s: float) -> bool:
        return row.arrival_s > (self._before_s if self._sizes.asynchronous else now_s)

    def _chunk(self, row: CountedRow, budget: int) -> int:
        tokens = min(budget, row.to_prefill)
        if tokens > 0:
            self._chunks.append((row, tokens))
        return max(0, tokens)

    def _admit(self, row: CountedRow) -> bool:
        size = self._sizes.block_tokens
        found = self.cache.take(row.blocks, row.nameless_tokens(size))
        if found is None:
            return False
        # The last token of a prompt is always computed, with its block.
        row.cached = row.computed = min(found * HASH_TOKENS, (row.prompt_tokens - 1) // size * size)
        self._to_prefill += row.to_prefill - row.expected
        return True

    def _work(self) -> StepWork:
        kv, pairs, scheduled = self._kv_tokens + self._decoding, 0, 0
        for row, tokens in self._chunks:
            kv += row.computed + tokens
            pairs += prefill_pairs(tokens, row.computed)
            scheduled += tokens
        return StepWork(
            prefill_tokens=scheduled - len(self._chunks),
            sequences=self._decoding + len(self._chunks),
            kv_tokens=kv,
            prefill_pairs=pairs,
        )

    def _jump_s(self, steps: int) -> float:
        """How long so many steps take in which rows only decode."""
        kv_tokens = self._kv_tokens + self._decoding * (steps + 1) // 2
        return steps * self._step_time(StepWork(sequences=self._decoding, kv_tokens=kv_tokens))

    def _cut(self, now_s: float) -> None:
        """End a jump with the step that is going on."""
        low, high = 1, self._jump
        while low < high:
            middle = (low + high) // 2
            if self._begun_s + self._jump_s(middle) < now_s:
                low = middle + 1
            else:
                high = middle
        if low < self._jump:
            took_s = self._jump_s(low)
            self.steps -= self._jump - low
            self.busy_s -= self.next_s - self._begun_s - took_s
            self._jump, self.next_s = low, self._begun_s + took_s
