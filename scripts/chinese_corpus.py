"""The Chinese example texts as a corpus for batch jobs: `python scripts/chinese_corpus.py out/zh`."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TEXTS = Path(__file__).parents[1] / "jobs" / "corpus-zh"


def write_chinese_corpus(folder: Path) -> pa.Table:
    """Write the texts as a Parquet file with the columns ``name`` and ``text``; returns all rows."""
    files = sorted(TEXTS.glob("*.txt"))
    table = pa.table(
        {"name": [file.stem for file in files], "text": [file.read_text(encoding="utf-8").strip() for file in files]}
    )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "texts.parquet")
    return table


if __name__ == "__main__":
    written = write_chinese_corpus(Path(sys.argv[1]))
    print(f"{written.num_rows} texts in {sys.argv[1]}")
