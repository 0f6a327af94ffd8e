"""What an engine has put out, in the house's own words."""

from __future__ import annotations

from collections.abc import Mapping

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

from hycluster.core import Output, TokenLogprob, Usage


def lengths_of(output: RequestOutput) -> dict[int, int]:
    """Tokens by the index of the sequence."""
    return {o.index: len(o.token_ids) for o in output.outputs}


def usage_of(output: RequestOutput, lengths: Mapping[int, int]) -> Usage:
    return Usage(len(output.prompt_token_ids or ()), sum(lengths.values()), output.num_cached_tokens or 0)


def output_of(output: CompletionOutput) -> Output:
    logprobs = None
    if output.logprobs is not None:
        logprobs = [[_logprob(token_id, entry) for token_id, entry in position.items()] for position in output.logprobs]
    return Output(output.index, output.text, list(output.token_ids), output.finish_reason, logprobs)


def _logprob(token_id: int, entry: Logprob) -> TokenLogprob:
    return TokenLogprob(token_id, entry.decoded_token or "", entry.logprob)
