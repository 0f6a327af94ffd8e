"""Real texts that every machine with hycluster has: what the installed packages say of themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from markdown_it import MarkdownIt

# A text of MAX_CHARS is about 400 tokens, a tenth of the context that deployments/local.yaml gives the model.
MIN_CHARS = 300
MAX_CHARS = 1600
MIN_PARAGRAPH_CHARS = 60
FILES = 3

# What Markdown leaves of reStructuredText: the address of a link, a role, a reference's underscore.
_RST_INLINE = re.compile(r"\s*<https?://[^>]*>_{0,2}|:[a-z:]+:(?=\w)|(?<=\w)__?(?=[\s.,;:)!?]|$)")
_RST_BLOCK = re.compile(r"^\.\. .*\n(?:[ \t]+\S.*\n?)*", re.MULTILINE)


def write_corpus(folder: Path, texts: int) -> pa.Table:
    """Write up to ``texts`` texts as Parquet files with the columns ``name`` and ``text``.

    Always the same rows in the same order for the same installed packages.

    Args:
        folder: made if need be; must not hold Parquet files already.

    Returns:
        All rows.
    """
    rows = sorted(descriptions())[:texts]
    table = pa.table({"name": [name for name, _ in rows], "text": [text for _, text in rows]})
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-table.num_rows // FILES)
    for number in range(FILES):
        pq.write_table(table.slice(number * size, size), folder / f"descriptions-{number}.parquet")
    return table


def descriptions() -> Iterator[tuple[str, str]]:
    """Name and description of each installed package that says enough, each name once."""
    seen = set()
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"].lower()
        text = plain(str(distribution.metadata.json.get("description", "")))
        if len(text) >= MIN_CHARS and name not in seen:
            seen.add(name)
            yield name, text


def plain(description: str) -> str:
    """The paragraphs of a Markdown or reStructuredText description as plain text, up to ``MAX_CHARS``.

    Badges, code, tables, lists, headings and HTML are left out; what is left ends at the end of a sentence.
    """
    description = _RST_BLOCK.sub("\n", description)
    paragraphs = []
    depth = 0
    inside = ""
    for token in MarkdownIt("commonmark").enable("table").parse(description):
        depth += token.nesting if token.type.startswith(("bullet_list", "ordered_list", "table")) else 0
        if token.type.endswith("_open"):
            inside = token.type
        if token.type != "inline" or inside != "paragraph_open" or depth:
            continue
        shown = "".join(
            " " if child.type in ("softbreak", "hardbreak") else child.content
            for child in token.children or ()
            if child.type in ("text", "code_inline", "softbreak", "hardbreak")
        )
        shown = " ".join(_RST_INLINE.sub("", shown).split())
        if _is_prose(shown):
            paragraphs.append(shown)
    return _cut("\n\n".join(paragraphs))


def _is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return (
        len(paragraph) >= MIN_PARAGRAPH_CHARS
        and letters >= 0.9 * len(paragraph)
        and paragraph[0].isalnum()
        and paragraph[-1] in ".!?"
    )


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARS:
        return text
    head = text[:MAX_CHARS]
    end = max(head.rfind(mark) for mark in (". ", ".\n", "! ", "? "))
    return head[: end + 1] if end >= MIN_CHARS else head.rsplit(" ", 1)[0]
