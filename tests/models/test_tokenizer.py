"""Prompts are opened but not ended, whatever kind of tokenizer a checkpoint brings."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from hycluster.models.tokenizer import open_ended

START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 256, 257


class TencentLike(PreTrainedTokenizer):
    """A slow tokenizer with Tencent's switches: bytes, an opening and an end token."""

    def __init__(self, add_bod_token: bool = True, add_eod_token: bool = True, **kwargs: Any) -> None:
        self.add_bod_token, self.add_eod_token = add_bod_token, add_eod_token
        self.special = {START: START_ID, END: END_ID}
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def vocab_size(self) -> int:
        return 258

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(256)} | self.special

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.special.get(token, ord(token[0]))

    def _convert_id_to_token(self, index: int) -> str:
        return {START_ID: START, END_ID: END}.get(index, chr(index % 256))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        start = [START_ID] if self.add_bod_token else []
        end = [END_ID] if self.add_eod_token else []
        return start + token_ids_0 + end


class Unswitched(TencentLike):
    """One that always ends its texts."""

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [START_ID, *token_ids_0, END_ID]


def fast(template: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, START: START_ID, END: END_ID}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[(START, START_ID), (END, END_ID)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("make", [TencentLike, Unswitched], ids=["switch", "no switch"])
def test_slow_tokenizers_keep_the_opening_and_lose_the_end(make: type[TencentLike]) -> None:
    assert make()("ab").input_ids == [START_ID, 97, 98, END_ID]
    tokenizer = open_ended(make())
    assert tokenizer("ab").input_ids == [START_ID, 97, 98]
    assert tokenizer.encode("ab") == [START_ID, 97, 98]
    assert tokenizer(["ab", "c"]).input_ids == [[START_ID, 97, 98], [START_ID, 99]]
    assert tokenizer("ab", add_special_tokens=False).input_ids == [97, 98]


@pytest.mark.parametrize(("template", "opening"), [(f"{START} $A {END}", [START_ID]), (f"$A {END}", [])])
def test_fast_tokenizers_keep_the_opening_and_lose_the_end(template: str, opening: list[int]) -> None:
    assert fast(template)("a b").input_ids == [*opening, 0, 1, END_ID]
    tokenizer = open_ended(fast(template))
    assert tokenizer("a b").input_ids == [*opening, 0, 1]
    assert tokenizer(["a b", "b"]).input_ids == [[*opening, 0, 1], [*opening, 1]]


def test_a_tokenizer_that_does_not_end_texts_is_left_alone() -> None:
    tokenizer = fast(f"{START} $A")
    before = tokenizer.backend_tokenizer.to_str()
    assert open_ended(tokenizer).backend_tokenizer.to_str() == before
