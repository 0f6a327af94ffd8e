"""How long an engine's step takes, learned from its own steps while it runs. Pure; numpy only.

    seconds = base + sequence x sequences + kv_token x tokens of KV cache read
                   + prefill_token x tokens of prefill + prefill_pair x pairs of a query and a key in prompts
    or, from so many tokens on, in place of the prefill tokens: prefill_token x (tokens of the step - free tokens)
    and of a model with experts, on top: experts x (share of the experts that the step's tokens are routed to)

A step reads all weights once (base), has work by the row (sampling, bookkeeping), reads each row's KV cache, and
computes in proportion to its tokens; and each token of a prompt is held against all that are before it, so that a
chunk late in a long prompt takes several times as long as an early one. On a CPU that comes on top, from the first
token. On a GPU it is hidden behind the reading of the weights until there are some hundred tokens: so many are free.
Coefficients and knee differ by orders of magnitude between a laptop and a GPU, so nothing is assumed but that none of
them is negative: each of a few knees is fitted, and the one that explains the steps best is taken, of equal ones the
one that was, at first the smallest.

The experts' share of a step follows from their number (:mod:`hycluster.engine.routed_weights`). What reading all of
them takes is fitted like the rest. But where bulk rows are in every step all of them read all experts, and nothing
tells the reading of experts from the base; so as far as the steps do not say otherwise, the two are as the bytes are
that they read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hycluster.engine.routed_weights import RoutedWeights

# What a step weighs after so many further steps is 1/e: the coefficients follow a machine that gets slower or faster.
MEMORY_STEPS = 200
# Steps seen before the coefficients are worth more than the first guess.
ENOUGH_STEPS = 4
# The normal equations take every step in; they are solved at each of the first ones, then at every few.
_SOLVE_ALL, _SOLVE_EVERY = 32, 8
# Pull towards the coefficients as they are, in steps: what the last steps say nothing about does not drift.
_INERTIA = 0.05
# And what prompts' tokens are held against has so many times as much of it: as long as all prompts are short, theirs
# tell no more than their tokens do.
_PAIR_INERTIA = 20.0
# A step so many times as long as was thought (a collection, a compilation, a neighbour) counts as one at this bound.
_OUTLIER = 3.0
# How much the bytes count against the steps: as if in so large a share of these they alone told experts from the base.
_BYTES = 0.003
_KV_UNIT, _PAIR_UNIT = 1024.0, 1024.0**2
# Tokens that may be free.
KNEES = (0, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
_KNEES = np.array(KNEES)
# A knee has to leave so much less unexplained than a smaller one; to leave less than this (of the square) is no merit.
_BETTER, _EXACT = 0.8, 1e-6
# A smaller one than was found has to leave less than it by so much: steps of a few tokens or of thousands, and none in
# between, fit all of them alike.
_STAYS = 0.87


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes.

    Attributes:
        prefill_tokens: of prompts, whole or in chunks, without each row's last token.
        sequences: rows in the step.
        kv_tokens: of the KV cache that they read, summed over rows.
        prefill_pairs: of a query and a key, in attention of the rows that have more than one token; see
            :func:`prefill_pairs`.
        elsewhere_tokens: in the other ranks' part of the step, routed to the same experts.
    """

    prefill_tokens: int = 0
    sequences: int = 0
    kv_tokens: int = 0
    prefill_pairs: int = 0
    elsewhere_tokens: int = field(default=0, kw_only=True)

    @property
    def routed_tokens(self) -> int:
        return self.prefill_tokens + self.sequences + self.elsewhere_tokens


class StepTime:
    """Predicts the time of a step; learns from each that is over.

    Attributes:
        experts: of a model that has some.
        free_tokens: of a step's tokens, how many cost nothing but what their rows do.
        error: mean relative error of the predictions, lately; 1 before there are any.
        most_sequences, most_prefill_tokens: largest step seen so far. Beyond twice that a prediction is a guess.
    """

    def __init__(self, experts: RoutedWeights | None = None) -> None:
        self.experts = experts
        self._terms = terms = 5 if experts is None else 6
        self._seen = 0
        self._best = 0
        # Steps that count still, the last one most.
        self._weight = 0.0
        self._normal: NDArray[np.float64] = np.zeros((len(KNEES), terms, terms))
        self._right: NDArray[np.float64] = np.zeros((len(KNEES), terms))
        self._found: NDArray[np.float64] = np.zeros((len(KNEES), terms))
        self._parts = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        self.error = 1.0
        self.most_sequences = self.most_prefill_tokens = 0

    @property
    def known(self) -> bool:
        """Whether enough steps were seen for a prediction to be worth something."""
        return self._seen >= ENOUGH_STEPS

    @property
    def free_tokens(self) -> int:
        return KNEES[self._best]

    @property
    def base_s(self) -> float:
        return self._parts[0]

    @property
    def prefill_token_s(self) -> float:
        return self._parts[1]

    @property
    def sequence_s(self) -> float:
        return self._parts[2]

    @property
    def kv_token_s(self) -> float:
        return self._parts[3]

    @property
    def prefill_pair_s(self) -> float:
        return self._parts[4]

    def experts_s(self, tokens: int) -> float:
        """For reading the experts that so many tokens are routed to; 0 for a dense model."""
        return self._parts[5] * self.experts.touched(tokens) if self.experts is not None else 0.0

    @property
    def coefficients_s(self) -> tuple[float, float, float, float]:
        """Base, a token of prefill, a sequence, a token of KV cache.

        All of them as if no token were free, every step read all experts, and each token of a prompt had as many before
        it as they had lately.
        """
        base, prefill, sequence, kv, pair, *experts = self._found[0].tolist()
        _, tokens, _, _, pairs = self._normal[0, 0, :5].tolist()
        prefill += pair * pairs / tokens if tokens else 0.0
        return base + sum(experts), prefill, sequence, kv / _KV_UNIT

    def predict(self, work: StepWork) -> float:
        """Seconds that a step of this work takes; 0 before any was seen."""
        base, prefill, sequence, kv, pair, _ = self._parts
        own = base + prefill * _paid(work, KNEES[self._best]) + sequence * work.sequences + kv * work.kv_tokens
        return own + pair * work.prefill_pairs + self.experts_s(work.routed_tokens)

    def chunk_s(self, tokens: int, computed: int, free: int = 0) -> float:
        """Seconds that a chunk of a prompt adds to a step beside what its row does.

        Args:
            tokens: of the chunk.
            computed: that the row has in the KV cache.
            free: as many of the tokens as cost nothing but their attention.
        """
        return self.prefill_token_s * max(0, tokens - free) + self.prefill_pair_s * prefill_pairs(tokens, computed)

    def chunk_within(self, seconds: float, computed: int, free: int = 0) -> float:
        """Tokens of the longest chunk that adds no more than that; see :meth:`chunk_s`."""
        pair_s = self.prefill_pair_s
        by_free = _solved(seconds, pair_s * computed, pair_s)
        if by_free <= free:
            return by_free
        return _solved(seconds + self.prefill_token_s * free, self.prefill_token_s + pair_s * computed, pair_s)

    def learn(self, work: StepWork, real_s: float) -> None:
        """Take note of a step that took ``real_s`` seconds."""
        if real_s <= 0 or not work.sequences:
            return
        predicted = self.predict(work)
        if self._seen == 0:
            self._guess(work, real_s)
        elif self.known and predicted > 0:
            self.error += (min(abs(real_s / predicted - 1), 1.0) - self.error) / 20
            real_s = min(real_s, _OUTLIER * predicted)
        self._seen += 1
        self.most_sequences = max(self.most_sequences, work.sequences)
        self.most_prefill_tokens = max(self.most_prefill_tokens, work.prefill_tokens)
        # By the relative error: a short step is worth as much as a long one.
        features = np.empty((len(KNEES), self._terms))
        features[:, :5] = 1.0, 0.0, work.sequences, work.kv_tokens / _KV_UNIT, work.prefill_pairs / _PAIR_UNIT
        if self.experts is not None:
            features[:, 5] = self.experts.touched(work.routed_tokens)
        features[:, 1] = np.maximum(work.prefill_tokens + work.sequences - _KNEES, 0)
        features[0, 1] = work.prefill_tokens
        features /= real_s
        keep = 1 - 1 / MEMORY_STEPS
        self._weight = keep * self._weight + 1
        self._normal *= keep
        self._normal += features[:, :, None] * features[:, None, :]
        self._right *= keep
        self._right += features
        if self._seen <= _SOLVE_ALL or self._seen % _SOLVE_EVERY == 0:
            self._solve_all()

    def _guess(self, work: StepWork, real_s: float) -> None:
        """Half of the first step's time for its being a step, half for its tokens."""
        each = real_s / 2 / (work.prefill_tokens + work.sequences)
        self._found[:, :5] = real_s / 2, each, each, 0.0, 0.0
        if self.experts is not None:
            share = self.experts.share
            read = 1 - share + share * self.experts.touched(work.routed_tokens)
            self._found[:, 0] *= (1 - share) / read
            self._found[:, 5] = real_s / 2 * share / read

    def _solve_all(self) -> None:
        """Fit each knee, and choose."""
        left = np.empty(len(KNEES))
        for knee, (normal, right) in enumerate(zip(self._normal, self._right, strict=True)):
            found = self._found[knee] = self._solve(normal, right, self._found[knee])
            left[knee] = max(self._weight - 2 * found @ right + found @ normal @ found, _EXACT * self._weight)
        # What was chosen of a few steps is a guess, and not kept.
        best = self._best if self._seen > MEMORY_STEPS else 0
        for knee in range(len(KNEES)):
            if left[knee] < (_BETTER if knee > best else _STAYS) * left[best]:
                best = knee
        self._best = best
        base, prefill, sequence, kv, pair, *experts = self._found[best].tolist()
        self._parts = base, prefill, sequence, kv / _KV_UNIT, pair / _PAIR_UNIT, sum(experts)

    def _solve(
        self, normal: NDArray[np.float64], right: NDArray[np.float64], before: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Least squares without negative coefficients: those that would be are left out, and the rest solved again."""
        diagonal = np.diag(normal)
        inertia = _INERTIA / max(1, self._seen)
        pull = np.maximum(inertia * diagonal, 1e-9 * diagonal.max() * inertia)
        pull[4] *= _PAIR_INERTIA
        normal = normal + np.diag(pull)
        right = right + pull * before
        free = np.ones(self._terms, dtype=bool)
        found = np.zeros(self._terms)
        bytes_say = self._bytes_say(normal[0, 0])
        while free.any():
            found = np.zeros(self._terms)
            # Of one of the two the bytes say nothing.
            said = normal + bytes_say if free[0] and free[-1] else normal
            found[free] = np.linalg.solve(said[np.ix_(free, free)], right[free])
            negative = found < 0
            if not negative.any():
                break
            free &= ~negative
        return np.maximum(found, 0)

    def _bytes_say(self, base: float) -> NDArray[np.float64]:
        """What draws base and experts to be as their bytes are; of no weight where the steps tell them apart."""
        found = np.zeros((self._terms, self._terms))
        if self.experts is not None:
            share = self.experts.share
            off = np.array([share, 0.0, 0.0, 0.0, 0.0, share - 1])
            found += _BYTES * base * np.outer(off, off)
        return found


def prefill_pairs(tokens: int, computed: int) -> int:
    """Pairs of a query and a key of a chunk of so many tokens after those that are computed; none of a single token."""
    return tokens * computed + tokens * (tokens + 1) // 2 if tokens > 1 else 0


def _solved(seconds: float, linear: float, square: float) -> float:
    """The tokens at which ``linear * tokens + square * tokens**2 / 2`` is so many seconds."""
    if seconds <= 0 or not (linear or square):
        return math.inf if seconds > 0 else 0.0
    return 2 * seconds / (linear + math.sqrt(linear * linear + 2 * square * seconds)) if square else seconds / linear


def _paid(work: StepWork, knee: int) -> int:
    """Tokens that cost time of their own: those of prompts, or all that are over the knee."""
    return max(0, work.prefill_tokens + work.sequences - knee) if knee else work.prefill_tokens
