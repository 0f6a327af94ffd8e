from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hycluster.errors import InvalidInput
from hycluster.summarize.files import files_of, read_text


def test_a_folder_is_its_texts(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "c.bin"):
        (tmp_path / name).write_text("x")
    (tmp_path / "d.txt").mkdir()
    folder, other = str(tmp_path), str(tmp_path / "c.bin")
    texts = [str(tmp_path / "a.md"), str(tmp_path / "b.txt")]
    assert files_of([other, folder, "-"]) == [other, *texts, "-"]
    assert files_of([texts[1], folder, texts[1]]) == [texts[1], texts[0]]


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"a b", "a b"), (b"\xef\xbb\xbfa\r\nb", "a\r\nb"), ("长江".encode(), "长江")],
)
def test_text(tmp_path: Path, data: bytes, text: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    assert read_text(str(path)) == text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"\x7fELF\0\0", "is binary or UTF-16"),
        ("text".encode("utf-16"), "is binary or UTF-16"),
        ("caf\xe9".encode("latin-1"), "is not text in UTF-8: byte 0xe9 at offset 3"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match=f"^{says}"):
        read_text(str(path))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such file"):
        read_text(str(tmp_path / "none.txt"))
    (folder,) = files_of([str(tmp_path)])
    with pytest.raises(InvalidInput, match=r"is a folder without \*.md or \*.txt files"):
        read_text(folder)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="can't be read: Not a directory"):
        read_text(str(tmp_path / "file" / "below"))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"from a pipe")))
    assert read_text("-") == "from a pipe"
