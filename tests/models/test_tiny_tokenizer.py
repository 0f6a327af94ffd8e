"""The tiny tokenizer, as AutoTokenizer reads it back from a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from hycluster.models import tiny
from hycluster.models.tiny import TinyShape
from hycluster.models.tiny_tokenizer import SMALLEST_VOCABULARY, SPECIAL_TOKENS, build_tokenizer

# transformers' own, at its first import
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TEXTS = ["The river.", "né à 東京 🙂\n\ttab", " <not special> ", ""]


@pytest.fixture(scope="module", params=["hunyuan-large", "hunyuan-a13b"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    shape = TinyShape(architecture=request.param, layers=1, cla=False, topk=2)
    return AutoTokenizer.from_pretrained(
        tiny.write_checkpoint(tmp_path_factory.mktemp("model"), shape), trust_remote_code=False
    )


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < len(tokenizer) <= 512


def test_a_plain_text_is_framed_as_a_document(tokenizer: Any) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("Rain"))
    assert tokens[0] == "<|startoftext|>"
    assert tokens[-1] == "<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode("Rain"), skip_special_tokens=True) == "Rain"


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Yes?"}


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([USER], "<|startoftext|>Hello<|extra_0|>"),
        ([SYSTEM, USER], "<|startoftext|>Be brief.<|extra_4|>Hello<|extra_0|>"),
        (
            [SYSTEM, USER, ASSISTANT, USER],
            "<|startoftext|>Be brief.<|extra_4|>Hello<|extra_0|>Yes?<|eos|><|startoftext|>Hello<|extra_0|>",
        ),
        ([USER, ASSISTANT], "<|startoftext|>Hello<|extra_0|>Yes?<|eos|>"),
    ],
)
def test_the_chat_format(tokenizer: Any, messages: list[dict[str, str]], text: str) -> None:
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    # As ids each special token is one, and nothing is put around them.
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == text
    special = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert sum(token in special for token in ids) == text.count("<|")


def test_special_tokens_follow_the_ordinary_ones_without_a_gap(tokenizer: Any) -> None:
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert tokenizer.eos_token == "<|endoftext|>"


def test_the_smallest_vocabulary_is_bytes_and_special_tokens() -> None:
    smallest = build_tokenizer(SMALLEST_VOCABULARY)
    assert len(smallest) == SMALLEST_VOCABULARY
    assert smallest.decode(smallest.encode(TEXTS[1], add_special_tokens=False)) == TEXTS[1]
