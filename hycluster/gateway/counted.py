"""Counts what comes of engines into the account of the request that asked for it, before anybody else sees it.

Pinned to vLLM 0.32.0: ``OutputProcessor.add_request`` is called before an engine hears of a request, once for each of
``n`` sequences, and all that comes is given to the collector's ``put``. ``tests/ledger/test_answers.py`` compares the
counts with what callers are told.
"""

from __future__ import annotations

from typing import Any

from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from hycluster.adapters import public_name
from hycluster.core import Priority
from hycluster.ledger.account import Account, account_now

# How vLLM ends a sequence that has no whole answer.
ABORTED, FAILED = "abort", "error"


class CountingOutputs(OutputProcessor):
    """vLLM's own, which tells the account of a request, if it has one, what comes."""

    def __init__(self, model: str, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._model = model

    def add_request(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        parent_req: ParentRequest | None = None,
        request_index: int = 0,
        queue: RequestOutputCollector | None = None,
    ) -> None:
        first = request_index == 0 and not self.has_request(request.request_id)
        super().add_request(request, prompt, parent_req, request_index, queue)
        account = account_now.get()
        if account is not None and queue is not None and first:
            name = public_name(request.lora_request.lora_name) if request.lora_request else self._model
            account.begin(name, bulk=request.priority >= Priority.BATCH)
            _count(account, queue)


def _count(account: Account, collector: RequestOutputCollector) -> None:
    put, delta = collector.put, collector.aggregate
    # Of cumulative outputs, by sequence, what is counted.
    counted: dict[int, int] = {}
    cached, begun, ended = 0, False, False

    # Called for each step of each stream.
    def tell(output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        nonlocal cached, begun, ended
        if isinstance(output, Exception):
            if not ended:
                ended = True
                account.end(failed=True)
            put(output)
            return
        if not begun:
            begun = True
            account.input_tokens += len(output.prompt_token_ids or ())
        if output.num_cached_tokens != cached:
            found = output.num_cached_tokens or 0
            account.cached_tokens += found - cached
            cached = found
        for sequence in output.outputs if isinstance(output, RequestOutput) else ():
            tokens = len(sequence.token_ids)
            if not delta:
                tokens, counted[sequence.index] = tokens - counted.get(sequence.index, 0), tokens
            account.output_tokens += tokens
        if output.finished and not ended:
            ended = True
            reasons = {each.finish_reason for each in output.outputs} if isinstance(output, RequestOutput) else ()
            account.end(failed=FAILED in reasons, aborted=ABORTED in reasons)
        put(output)

    collector.put = tell  # type: ignore[method-assign]
