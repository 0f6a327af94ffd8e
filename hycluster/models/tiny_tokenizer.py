"""A small tokenizer that behaves like Tencent's: same special tokens, same chat format, same plain ``encode``.

Source of the behaviour: ``tokenization_hy.py`` and ``tokenizer_config.json`` of Tencent's published checkpoints. It
needs no remote code, and its vocabulary is learned from the few lines below.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# In Tencent's order: their ids follow the ordinary tokens' without a gap.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|startoftext|>",
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    *(f"<|extra_{number}|>" for number in range(6)),
)
BYTES = 256
SMALLEST_VOCABULARY = BYTES + len(SPECIAL_TOKENS)

# <|extra_4|> ends the system message, <|extra_0|> a user's turn, <|eos|> an assistant's; <|startoftext|> opens the
# system message and every user's turn but the one right behind it. The turn to generate needs no opening token.
CHAT_TEMPLATE = resources.files(__package__).joinpath("templates", "tiny_chat.jinja")

_TEXT = """\
A river that comes down from the mountains carries the same water past many towns, and each of them knows it by a name
of its own. The clerk who wrote the letters of the harbour office kept a list of every ship, the day on which it had
come in, what it brought and where it was going next. In the morning the market opens before the sun is up; there are
apples, bread, fish from the lake, and people who have been talking since they left home. When it rains for a week the
lower road is under water and the post goes round by the bridge. She asked him whether the machine had been running
through the night, and he said that it had stopped twice, once for the oil and once for no reason that anyone could
find. Nobody reads the whole of a long book at once: one begins, puts it away, and returns to the page that was left
open. The children counted one, two, three, four, five, six, seven, eight, nine, ten, and then began again from one.
What is written here has no other use than to teach a small list of words which letters like to stand together.
"""


@cache
def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with at most ``vocabulary`` tokens, special ones included.

    Args:
        vocabulary: at least :data:`SMALLEST_VOCABULARY`; above about 650 there is nothing more to learn from the text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    # As Tencent's: a plain text is framed as a whole document, and the chat template asks for no frame.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<|startoftext|>", "<|endoftext|>")],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    return fast
