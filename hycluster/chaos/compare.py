"""Whether an answer under faults is the one that an undisturbed cluster gave."""

from __future__ import annotations

from hycluster.chaos.ask import Reply, Said
from hycluster.chaos.requests import Request
from hycluster.errors import shown

# What computing a prompt again in other pieces may change, in float32, is below a thousandth.
LOGPROB_TOLERANCE = 0.01


def difference(request: Request, expected: Reply, got: Reply) -> str | None:
    """What is wrong with an answer; None if nothing is.

    Greedy and seeded answers must be the same: texts, token ids, finish reasons, usage; logprobs within
    ``LOGPROB_TOLERANCE``. Of others only the form is known.
    """
    if got.prompt_tokens != expected.prompt_tokens:
        return f"prompt_tokens {got.prompt_tokens}, undisturbed {expected.prompt_tokens}"
    if wrong := ill_formed(request, got):
        return wrong
    if not request.exact:
        return None
    for index, (want, have) in enumerate(zip(expected.said, got.said, strict=True)):
        if wrong := _differs(want, have):
            return f"answer {index}: {wrong}" if len(got.said) > 1 else wrong
    if got.completion_tokens != expected.completion_tokens:
        return f"completion_tokens {got.completion_tokens}, undisturbed {expected.completion_tokens}"
    return None


def _differs(want: Said, have: Said) -> str | None:
    if want.token_ids != have.token_ids:
        pairs = zip(want.token_ids, have.token_ids, strict=False)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(want.token_ids), len(have.token_ids)))
        return (
            f"token {same} of {len(have.token_ids)} is {_at(have.token_ids, same)}, undisturbed"
            f" {_at(want.token_ids, same)} of {len(want.token_ids)}"
        )
    if want.text != have.text:
        same = next((at for at, (a, b) in enumerate(zip(want.text, have.text, strict=False)) if a != b), 0)
        return f"text {shown(have.text[same:], 30)} from character {same}, undisturbed {shown(want.text[same:], 30)}"
    if want.finish_reason != have.finish_reason:
        return f"finish_reason {have.finish_reason!r}, undisturbed {want.finish_reason!r}"
    for at, (a, b) in enumerate(zip(want.logprobs or (), have.logprobs or (), strict=True)):
        if abs(a - b) > LOGPROB_TOLERANCE:
            return f"logprob {b:.4f} of token {at}, undisturbed {a:.4f}"
    return None


def _at(token_ids: tuple[int, ...], index: int) -> object:
    return token_ids[index] if index < len(token_ids) else "none"


def ill_formed(request: Request, got: Reply) -> str | None:
    """What no answer to this request can be like, whatever was sampled."""
    sampling = request.sampling
    tokens = sum(len(said.token_ids) for said in got.said)
    if got.completion_tokens != tokens:
        return f"completion_tokens {got.completion_tokens} for {tokens} tokens"
    for index, said in enumerate(got.said):
        count = len(said.token_ids)
        if said.finish_reason not in ("stop", "length"):
            return f"answer {index}: finish_reason {said.finish_reason!r}"
        if said.finish_reason == "length" and count != sampling.max_tokens:
            return f"answer {index}: finish_reason 'length' after {count} of {sampling.max_tokens} tokens"
        if said.finish_reason == "stop" and not sampling.stop:
            return f"answer {index}: finish_reason 'stop' without a stop string"
        if any(word in said.text for word in sampling.stop):
            return f"answer {index}: a stop string is in the text"
        if said.logprobs is not None and len(said.logprobs) != count:
            return f"answer {index}: {len(said.logprobs)} logprobs for {count} tokens"
    return None
