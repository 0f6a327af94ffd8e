"""What is asked: requests of all sorts, a pure function of the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hycluster.core import Sampling

Ingress = Literal["http", "grpc"]
FEATURES = "n", "logprobs", "stop"
WORDS = (  # noqa: SIM905 - easier to read
    "the river carries stones from hills to sea and nobody counts them while night trains pass over an old bridge"
    " where children once wrote numbers names and small wishes into wet cement before winter came with snow"
).split()
# Letters that most texts have, so that some answers end at one of them and the others must not.
STOPS = ("z", "ough", "qu", "\n\n", "; ")
GREEDY, SEEDED = 0.5, 0.85


@dataclass(frozen=True, slots=True)
class Request:
    """One request, the same in the undisturbed run and under faults.

    Attributes:
        chat: ``prompt`` is what a user says; else it is the text to go on with.
    """

    number: int
    ingress: Ingress
    chat: bool
    prompt: str
    sampling: Sampling

    @property
    def exact(self) -> bool:
        """Its answer is settled: greedy, or with a seed."""
        return self.sampling.temperature == 0 or self.sampling.seed is not None

    def __str__(self) -> str:
        s = self.sampling
        how = "greedy" if s.temperature == 0 else "unseeded" if s.seed is None else f"seed {s.seed}"
        extras = [f"n {s.n}"] * (s.n > 1) + [f"logprobs {s.logprobs}"] * (s.logprobs is not None)
        words = [
            self.ingress,
            "chat" if self.chat else "completion",
            how,
            *extras,
            *(f"stop {word!r}" for word in s.stop),
        ]
        return f"request {self.number} ({', '.join(words)}, at most {s.max_tokens} tokens)"


@dataclass(frozen=True, slots=True)
class Mix:
    """What the requests are like.

    Attributes:
        ingresses: which ingress they go to, in turn.
        prompt_tokens, output_tokens: from, to.
        tokens_a_word: of the model's tokenizer, on ``WORDS``.
        features: of ``FEATURES``; some requests use them.
    """

    seed: int
    count: int
    ingresses: Sequence[Ingress] = ("http", "grpc")
    prompt_tokens: tuple[int, int] = (8, 256)
    output_tokens: tuple[int, int] = (16, 128)
    tokens_a_word: float = 1.3
    features: Sequence[str] = FEATURES


def requests(mix: Mix) -> list[Request]:
    """The requests of a mix, in the order in which they are asked."""
    # Not the numbers that settle the faults.
    draw = random.Random(f"requests {mix.seed}")
    return [_request(mix, number, draw) for number in range(mix.count)]


def _request(mix: Mix, number: int, draw: random.Random) -> Request:
    # All is drawn for every request, so that leaving a feature out changes nothing else.
    words = max(1, round(_length(mix.prompt_tokens, draw) / mix.tokens_a_word) - 1)
    # The number first: no two requests share a prefix in the KV cache.
    prompt = " ".join([str(number), *draw.choices(WORDS, k=words)])
    max_tokens, how, seed = _length(mix.output_tokens, draw), draw.random(), draw.randrange(1 << 31)
    two, logprobs, stop, stops = draw.random() < 0.2, draw.random() < 0.25, draw.random() < 0.25, draw.sample(STOPS, 2)
    greedy = how < GREEDY
    return Request(
        number=number,
        ingress=mix.ingresses[number % len(mix.ingresses)],
        chat=draw.random() < 0.5,
        prompt=prompt,
        sampling=Sampling(
            max_tokens=max_tokens,
            temperature=0.0 if greedy else 0.9,
            seed=seed if not greedy and how < SEEDED else None,
            ignore_eos=True,
            # vLLM refuses several answers that are all the likeliest one.
            n=2 if two and not greedy and "n" in mix.features else 1,
            logprobs=2 if logprobs and "logprobs" in mix.features else None,
            stop=tuple(stops) if stop and "stop" in mix.features else (),
        ),
    )


def _length(bounds: tuple[int, int], draw: random.Random) -> int:
    """Most are short and a few are long, as with people."""
    low, high = bounds
    return low + int((high - low) * draw.random() ** 2)
