"""How long an engine's step takes, learned from its own steps while it runs. Pure; numpy only.

    seconds = base + prefill_token x tokens of prefill + sequence x sequences + kv_token x tokens of KV cache read

Four numbers do: a step reads all weights once (base), computes in proportion to its tokens (prefill), has work by the
row (sampling, bookkeeping, on a CPU also the matrix products) and reads each row's KV cache. They differ by three
orders of magnitude between a laptop and a GPU, so nothing is assumed but that none of them is negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# What a step weighs after so many further steps is 1/e: the coefficients follow a machine that gets slower or faster.
MEMORY_STEPS = 200
# Steps seen before the coefficients are worth more than the first guess.
ENOUGH_STEPS = 4
# The normal equations take every step in; they are solved at each of the first ones, then at every few.
_SOLVE_ALL, _SOLVE_EVERY = 32, 8
# Pull towards the coefficients as they are, in steps: what the last steps say nothing about does not drift.
_INERTIA = 0.05
# A step so many times as long as was thought (a collection, a compilation, a neighbour) counts as one at this bound.
_OUTLIER = 3.0
_KV_UNIT = 1024.0


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes.

    Attributes:
        prefill_tokens: of prompts, whole or in chunks, without each row's last token.
        sequences: rows in the step.
        kv_tokens: of the KV cache that they read, summed over rows.
    """

    prefill_tokens: int = 0
    sequences: int = 0
    kv_tokens: int = 0


class StepTime:
    """Predicts the time of a step; learns from each that is over.

    Attributes:
        error: mean relative error of the predictions, lately; 1 before there are any.
        most_sequences, most_prefill_tokens: largest step seen so far. Beyond twice that a prediction is a guess.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._normal: NDArray[np.float64] = np.zeros((4, 4))
        self._right: NDArray[np.float64] = np.zeros(4)
        self._coefficients: NDArray[np.float64] = np.zeros(4)
        self.error = 1.0
        self.most_sequences = self.most_prefill_tokens = 0

    @property
    def known(self) -> bool:
        """Whether enough steps were seen for a prediction to be worth something."""
        return self._seen >= ENOUGH_STEPS

    @property
    def base_s(self) -> float:
        return float(self._coefficients[0])

    @property
    def prefill_token_s(self) -> float:
        return float(self._coefficients[1])

    @property
    def sequence_s(self) -> float:
        return float(self._coefficients[2])

    @property
    def kv_token_s(self) -> float:
        return float(self._coefficients[3]) / _KV_UNIT

    @property
    def coefficients_s(self) -> tuple[float, float, float, float]:
        """Base, a token of prefill, a sequence, a token of KV cache."""
        return self.base_s, self.prefill_token_s, self.sequence_s, self.kv_token_s

    def predict(self, work: StepWork) -> float:
        """Seconds that a step of this work takes; 0 before any was seen."""
        return float(_features(work) @ self._coefficients)

    def learn(self, work: StepWork, real_s: float) -> None:
        """Take note of a step that took ``real_s`` seconds."""
        if real_s <= 0 or not work.sequences:
            return
        features = _features(work)
        predicted = float(features @ self._coefficients)
        if self._seen == 0:
            self._guess(work, real_s)
        elif self.known and predicted > 0:
            self.error += (min(abs(real_s / predicted - 1), 1.0) - self.error) / 20
            real_s = min(real_s, _OUTLIER * predicted)
        self._seen += 1
        self.most_sequences = max(self.most_sequences, work.sequences)
        self.most_prefill_tokens = max(self.most_prefill_tokens, work.prefill_tokens)
        # By the relative error: a short step is worth as much as a long one.
        weight = 1 / real_s**2
        keep = 1 - 1 / MEMORY_STEPS
        self._normal = keep * self._normal + weight * np.outer(features, features)
        self._right = keep * self._right + weight * real_s * features
        if self._seen <= _SOLVE_ALL or self._seen % _SOLVE_EVERY == 0:
            self._coefficients = self._solve()

    def _guess(self, work: StepWork, real_s: float) -> None:
        """Half of the first step's time for its being a step, half for its tokens."""
        each = real_s / 2 / (work.prefill_tokens + work.sequences)
        self._coefficients = np.array([real_s / 2, each, each, 0.0])

    def _solve(self) -> NDArray[np.float64]:
        """Least squares without negative coefficients: those that would be are left out, and the rest solved again."""
        scale = np.diag(self._normal).max() * _INERTIA / max(1, self._seen)
        pull = np.maximum(_INERTIA / max(1, self._seen) * np.diag(self._normal), 1e-9 * scale)
        normal = self._normal + np.diag(pull)
        right = self._right + pull * self._coefficients
        free = np.ones(4, dtype=bool)
        found = np.zeros(4)
        while free.any():
            found = np.zeros(4)
            found[free] = np.linalg.solve(normal[np.ix_(free, free)], right[free])
            negative = found < 0
            if not negative.any():
                break
            free &= ~negative
        return np.maximum(found, 0)


def _features(work: StepWork) -> NDArray[np.float64]:
    return np.array([1.0, work.prefill_tokens, work.sequences, work.kv_tokens / _KV_UNIT])
