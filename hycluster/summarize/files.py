"""The FILE arguments of a command, as texts."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from hycluster.errors import InvalidInput

STDIN = "-"
# What is taken from a folder, by the ends of the names.
SUFFIXES = (".md", ".txt")


def files_of(arguments: Iterable[str]) -> list[str]:
    """The files that are meant, each once: a folder stands for the texts that lie in it, sorted by name.

    A folder without texts stays in the list, for :func:`read_text` to refuse.
    """
    found: list[str] = []
    for argument in arguments:
        folder = Path(argument)
        inside = []
        if argument != STDIN and folder.is_dir():
            inside = sorted(str(path) for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
        found += inside or [argument]
    return list(dict.fromkeys(found))


def read_text(file: str) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; ``-`` is standard input.

    Raises:
        InvalidInput: there is no such file, it can't be read, or it holds no text; does not name the file.
    """
    try:
        data = sys.stdin.buffer.read() if file == STDIN else Path(file).read_bytes()
    except FileNotFoundError:
        raise InvalidInput("no such file") from None
    except IsADirectoryError:
        raise InvalidInput(f"is a folder without *{' or *'.join(SUFFIXES)} files") from None
    except OSError as error:
        raise InvalidInput(f"can't be read: {error.strerror or error}") from None
    if b"\0" in data:
        raise InvalidInput("is binary or UTF-16; must be text in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"is not text in UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it, as by iconv"
        ) from None
    if not text.strip():
        raise InvalidInput("is empty")
    return text
