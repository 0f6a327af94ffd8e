"""What one step of an engine leaves to bulk rows, and what they take of it. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hycluster.engine.step_time import StepTime, StepWork

# A chunk of a prompt has at least so many tokens, or as many as cost what its row does if these are fewer; unless the
# step has nothing else.
LEAST_CHUNK_TOKENS = 16
# A step may be so many times as large as any before it: beyond that its predicted time is a guess.
GROWTH = 2
# And at first has this many sequences and tokens of prompts.
FIRST_SEQUENCES, FIRST_TOKENS = 4, 64
# Online steps of the past that count; one step may be lengthened by so many times the share.
MEAN_STEPS, MOST_SHARES = 10_000, 2


@dataclass(frozen=True, slots=True)
class BulkRow:
    """A bulk row that could have ``tokens`` in a step.

    Attributes:
        computed: tokens that it has in the KV cache.
        divisible: whether a part of them would do; of a prompt, mostly.
        lora: number of its adapter; 0 is none.
    """

    request_id: str
    computed: int
    tokens: int
    divisible: bool = False
    lora: int = 0


@dataclass(slots=True)
class StepRoom:
    """What one step leaves to bulk rows.

    Attributes:
        bulk_s: time that they may add to it.
        sequences, prefill_tokens: most rows, and most tokens of prompts, for all of the step.
        free_tokens: tokens that add no time, whoever takes them first; see :class:`StepTime`.
        least_chunk: tokens of a prompt below which a row waits for a step with more room.
        others: whether anything else is in it, so that it need not be a bulk row.
        loras: numbers of the adapters in it, or to come into it.
        max_loras: most of them in one step.
        used_s: time that bulk rows add to it, as predicted.
        taken: ids of the bulk rows in it.
        only_free: bulk rows get no others; what they add is what their rows and their KV cache take.
        tokens: in it so far, and in the other ranks' part of it: which experts are read anyhow.
        experts_s: time that they may add on top of ``bulk_s``, by what else is read of experts.
        read_s: of ``used_s``, what they add by that; but for the first row of a step that has nothing else.
    """

    bulk_s: float = math.inf
    sequences: float = math.inf
    prefill_tokens: float = math.inf
    free_tokens: int = 0
    least_chunk: int = LEAST_CHUNK_TOKENS
    others: bool = False
    loras: set[int] = field(default_factory=set)
    max_loras: float = math.inf
    used_s: float = 0.0
    taken: set[str] = field(default_factory=set)
    only_free: bool = False
    tokens: int = 0
    experts_s: float = 0.0
    read_s: float = 0.0

    @classmethod
    def of(
        cls,
        bulk_s: float,
        cost: StepTime,
        others: StepWork | None = None,
        *,
        only_free: bool = False,
        elsewhere_tokens: int = 0,
        experts_s: float = 0.0,
    ) -> StepRoom:
        """For so much time, as far as the model of the step time can be trusted.

        Args:
            others: what is in the step anyhow.
            elsewhere_tokens: in the other ranks' part of it, if ``others`` does not say.
        """
        used = others.prefill_tokens + others.sequences if others is not None else 0
        least = LEAST_CHUNK_TOKENS
        if cost.prefill_token_s > 0:
            # A chunk that costs less than its row does is not worth the row.
            # Rounded first: which last bit a fit ends with is up to the libraries and the machine.
            least = max(1, min(least, math.ceil(round(cost.sequence_s / cost.prefill_token_s, 6))))
        return cls(
            bulk_s=bulk_s,
            sequences=max(GROWTH * cost.most_sequences, FIRST_SEQUENCES),
            prefill_tokens=max(GROWTH * cost.most_prefill_tokens, FIRST_TOKENS),
            free_tokens=max(0, cost.free_tokens - used),
            least_chunk=least,
            others=others is not None,
            only_free=only_free,
            tokens=others.routed_tokens if others is not None else elsewhere_tokens,
            experts_s=experts_s,
        )

    def grant(self, row: BulkRow, cost: StepTime) -> int:
        """How many of its tokens the row gets, which is noted: all, fewer if it is divisible, or none."""
        # Something has to be in a step, or the engine would turn in a circle.
        needed = not self.others and not self.taken
        if not needed and (self.sequences < 1 or self.bulk_s <= 0):
            return 0
        if row.lora and row.lora not in self.loras and len(self.loras) >= self.max_loras:
            return 0
        row_s = cost.sequence_s + cost.kv_token_s * row.computed
        # What a row's last token costs is its row's.
        more = row.tokens - 1
        fits = min(self.prefill_tokens, self._fitting(row, row_s, cost))
        if fits < more:
            least = min(more, self.least_chunk) if row.divisible else more
            if fits < least and not needed:
                return 0
            more = max(least, int(fits))
        more = min(more, row.tokens - 1)
        # Where some are free, a row's last token is one like the others.
        tokens = more + 1 if cost.free_tokens else more
        free = min(tokens, self.free_tokens)
        takes = row_s + cost.chunk_s(tokens, row.computed, free)
        reads = self._reads_s(more + 1, cost)
        self.free_tokens -= free
        self.bulk_s -= takes + max(0.0, reads - self.experts_s)
        self.experts_s = max(0.0, self.experts_s - reads)
        self.used_s += takes + reads
        # A rank that has no row in a step has a dummy one.
        self.read_s += 0.0 if needed else reads
        self.tokens += more + 1
        self.sequences -= 1
        self.prefill_tokens -= more
        self.taken.add(row.request_id)
        if row.lora:
            self.loras.add(row.lora)
        return more + 1

    def _fitting(self, row: BulkRow, row_s: float, cost: StepTime) -> float:
        """Tokens beside its last one for which there is time; negative if there is none for the row itself."""
        left = self.bulk_s - row_s - max(0.0, self._reads_s(row.tokens, cost) - self.experts_s)
        if left < 0:
            return -1
        fits = cost.chunk_within(left, row.computed, self.free_tokens)
        if self.only_free:
            fits = min(fits, self.free_tokens)
        return fits - 1 if cost.free_tokens else fits

    def _reads_s(self, tokens: int, cost: StepTime) -> float:
        """What so many tokens more take to read experts that the step does not read yet."""
        return cost.experts_s(self.tokens + tokens) - cost.experts_s(self.tokens)


class Slowdown:
    """How much bulk rows may lengthen steps with online work in them: by a share of these steps' time.

    Where no token is free, of each step. Where some are, on GPUs, bulk rows take only these: any other costs the same
    whichever step it is in, and one that is free costs nothing. A long online prompt leaves none. So all of the share
    is added to the steps without one, as far as that is not out of proportion: online callers wait for hundreds of
    steps a request, and for the mean of them. What lengthens steps lets more online requests be there at once, which
    lengthens them further; by the arithmetic alone, tokens come slower by more than the share when engines are full.

    What is read of experts is dear for the first bulk rows of a step and nothing for the last ones. So it is saved for,
    step by step, until there is enough for all that could come: one step of many takes them all, and the others none.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._seen = 0
        # Of the last steps: how long they were without bulk rows, and how many of them had free tokens.
        self._mean_s = self._with_free = 0.0
        self._saved_s = 0.0

    def note(self, online: StepWork, cost: StepTime) -> None:
        """Take note of the online work of a step."""
        self._seen = min(self._seen + 1, MEAN_STEPS)
        self._mean_s += (cost.predict(online) - self._mean_s) / self._seen
        self._with_free += (_has_free(online, cost) - self._with_free) / self._seen

    def may_add(self, online: StepWork, cost: StepTime) -> float:
        """Seconds, to a step with this online work."""
        own_s = cost.predict(online)
        if not cost.free_tokens or not self._with_free:
            return self._share * own_s
        return self._share * min(max(own_s, self._mean_s / self._with_free), MOST_SHARES * own_s)

    def experts_s(self, read: int, more: int, may_add_s: float, cost: StepTime) -> float | None:
        """Seconds that bulk rows may lengthen a step by in reading experts; None while that is saved for. Once a step.

        Args:
            read: tokens whose experts the step reads anyhow.
            more: of bulk rows, those that could come.
            may_add_s: what this step adds to the savings.
        """
        wanted = cost.experts_s(read + more) - cost.experts_s(read)
        # Never more than is of use.
        self._saved_s = min(self._saved_s + may_add_s, cost.experts_s(read + more))
        return self._saved_s if wanted <= self._saved_s else None

    def spend(self, seconds: float) -> None:
        """Take note of what bulk rows added to a step, all in all."""
        self._saved_s = max(0.0, self._saved_s - seconds)


def _has_free(work: StepWork, cost: StepTime) -> bool:
    return work.prefill_tokens + work.sequences < cost.free_tokens
