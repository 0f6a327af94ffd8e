from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
from chinese_corpus import write_chinese_corpus

from hycluster.batch.prompts import language_of


def test_the_texts_are_chinese_and_in_the_corpus(tmp_path: Path) -> None:
    table = write_chinese_corpus(tmp_path / "zh")
    assert table.num_rows == 6
    assert {language_of(text) for text in table["text"].to_pylist()} == {"zh"}
    assert pq.read_table(tmp_path / "zh").equals(table)
