from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demo_corpus import MAX_CHARS, MIN_CHARS, plain, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(scope="module")
def texts(folder: Path) -> pa.Table:
    """All that is installed is read for it."""
    return write_corpus(folder, 48)


def test_the_corpus_is_at_least_40_real_texts_in_several_files(folder: Path, texts: pa.Table) -> None:
    assert texts.num_rows >= 40
    assert len(set(texts["name"].to_pylist())) == texts.num_rows
    lengths = [len(text) for text in texts["text"].to_pylist()]
    assert min(lengths) >= MIN_CHARS
    assert max(lengths) <= MAX_CHARS
    assert len({length // 100 for length in lengths}) > 5
    files = sorted(folder.glob("*.parquet"))
    assert len(files) == 3
    assert pa.concat_tables([pq.read_table(file) for file in files]) == texts


def test_the_corpus_is_always_the_same(texts: pa.Table, tmp_path: Path) -> None:
    assert write_corpus(tmp_path / "again", 12) == texts.slice(0, 12)


def test_markdown_becomes_its_paragraphs() -> None:
    description = """# Title

[![badge](https://x/y.svg)](https://x)

**Thing** does the `work` of [several](https://x) other things, and it does
so in plain sight of everyone who looks.

| a | b |
|---|---|
| a table that is long enough to be taken for a paragraph of text, but none. | x |

- an item of a list that is long enough to be taken for a paragraph of text, but none.

```python
print("a line of code that is long enough to be taken for a paragraph of text, but none.")
```

Too short.
"""
    sentence = "Thing does the work of several other things, and it does so in plain sight of everyone who looks."
    assert plain(description) == sentence


def test_restructured_text_becomes_its_paragraphs() -> None:
    description = """Title
=====

.. image:: https://x/y.svg
   :alt: a badge that says something long enough to be taken for a paragraph, but none.

The ``thing`` implements `the protocol <https://x/y>`_ on top of Trio_, and calls :class:`Thing` wherever it can.
"""
    assert plain(description) == ("The thing implements the protocol on top of Trio, and calls Thing wherever it can.")


def test_a_long_text_ends_with_a_sentence() -> None:
    text = plain("This is a sentence that says just about nothing at all, again and again. " * 100)
    assert MAX_CHARS - 100 < len(text) <= MAX_CHARS
    assert text.endswith("again.")
