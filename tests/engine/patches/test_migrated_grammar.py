from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TOKENS = [5, 6, 7]


class Manager:
    """In the place of vLLM's manager: a grammar is a list of what it has accepted; it refuses a 9."""

    def grammar_init(self, request: Any) -> None:
        request.structured_output_request.grammar = self._create_grammar(request)

    def _create_grammar(self, request: Any) -> list[int]:
        return []

    def accept_tokens(self, request: Any, new_token_ids: list[int]) -> bool:
        request.structured_output_request.grammar += new_token_ids
        request.structured_output_request.reasoning_ended = True
        return 9 not in new_token_ids


def begun(tokens: list[int]) -> Any:
    """A request that came with tokens, once its grammar is there."""
    from hycluster.engine.patches.migrated_grammar import patch_grammars

    manager: Any = Manager()
    tokens_of: Any = lambda params: params.tokens  # noqa: E731
    lead: Any = lambda request: request.output.extend(tokens)  # noqa: E731
    patch_grammars(manager, tokens_of, lead)
    structured = SimpleNamespace(grammar=None, reasoning_ended=False)
    request: Any = SimpleNamespace(
        request_id="r", sampling_params=SimpleNamespace(tokens=tokens), structured_output_request=structured, output=[]
    )
    manager.grammar_init(request)
    return request


def test_a_grammar_is_led_past_what_the_request_has() -> None:
    request = begun(TOKENS)
    assert request.structured_output_request.grammar == request.output == TOKENS
    assert request.structured_output_request.reasoning_ended


def test_a_request_of_its_own_begins_at_the_beginning() -> None:
    request = begun([])
    assert request.structured_output_request.grammar == []
    assert not request.structured_output_request.reasoning_ended


def test_tokens_that_it_refuses_end_the_request() -> None:
    with pytest.raises(ValueError, match="request r: its grammar refuses"):
        begun([9])


def test_vllms_own_still_begins_at_the_beginning() -> None:
    """Where it makes a grammar it looks at no output; and has what the patch changes."""
    from vllm.v1.structured_output import StructuredOutputManager

    of = inspect.signature
    assert list(of(StructuredOutputManager.grammar_init).parameters) == ["self", "request"]
    assert list(of(StructuredOutputManager._create_grammar).parameters) == ["self", "request"]
    assert list(of(StructuredOutputManager.accept_tokens).parameters) == ["self", "request", "new_token_ids"]
    made = inspect.getsource(StructuredOutputManager.grammar_init)
    assert "self._create_grammar" in made
    made += inspect.getsource(StructuredOutputManager._create_grammar)
    for of_output in ("output_token_ids", "all_token_ids", "accept_tokens", "num_output_tokens"):
        assert of_output not in made
