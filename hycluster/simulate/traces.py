"""Traces of real requests: when each came, how long it was, and which prefixes it shares with others.

Two formats, plain or gzipped, told apart by their first line:

- Mooncake's: a JSON object a line with ``timestamp`` (ms), ``input_length`` and ``output_length`` (tokens), and
  ``hash_ids``, one for each 512 tokens of the prompt; equal ids in front are a common prefix.
- Azure's: CSV with the columns ``TIMESTAMP,ContextTokens,GeneratedTokens``. It says nothing of
  prefixes, so none is shared.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hycluster.errors import SettingsError, shown

# Tokens of a prompt that one of Mooncake's hashes stands for.
HASH_TOKENS = 512
AZURE_HEADER = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
# A prompt or an output as long as that is a slip of the pen.
_MOST_TOKENS = 100_000_000
# Prefixes of a further copy of a trace, and prompts that share none, have ids of their own from here on.
_OWN_IDS = 1 << 40


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        at_s: seconds after the trace's first.
        hash_ids: one for each 512 tokens of the prompt, the last one for what is left; empty if its format has none.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()

    def of_others(self, copy: int) -> TraceRequest:
        """The same with prefixes that no other copy has."""
        return dataclasses.replace(self, hash_ids=tuple(one + copy * _OWN_IDS for one in self.hash_ids))


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests of a file, in order of time.

    Raises:
        SettingsError: the file can't be read or is no trace; names the line, the field, its value and what is allowed.
    """
    try:
        packed = path.read_bytes()
        text = (gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed).decode("utf-8-sig")
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not text in UTF-8 ({error.reason} at byte {error.start})") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SettingsError(f"{path}: is not a whole gzip file: {error}") from error
    except OSError as error:
        raise SettingsError(f"{path}: can't be read: {error.strerror}") from error
    first = next((line for line in text.splitlines() if line.strip()), "")
    if not first:
        raise SettingsError(f"{path}: is empty; must be a trace, JSON lines or CSV")
    parse = _mooncake if first.lstrip().startswith("{") else _azure
    found = list(parse(text, lambda number: _Line(path, number)))
    if not found:
        raise SettingsError(f"{path}: has no requests, only a header")
    begun = min(request.at_s for request in found)
    found.sort(key=lambda request: request.at_s)
    return [dataclasses.replace(request, at_s=request.at_s - begun) for request in found]


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a trace, to say what is wrong with it."""

    path: Path
    number: int

    def wrong(self, field: str, value: Any, allowed: str) -> SettingsError:
        return SettingsError(
            f"{self.path}: line {self.number}: {field}: {shown(value)} is not allowed; must be {allowed}"
        )

    def bad(self, problem: str) -> SettingsError:
        return SettingsError(f"{self.path}: line {self.number}: {problem}")

    def tokens(self, field: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= _MOST_TOKENS:
            raise self.wrong(field, value, f"a whole number from 1 to {_MOST_TOKENS}")
        return value


def _mooncake(text: str, line_at: Callable[[int], _Line]) -> Iterator[TraceRequest]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        at = line_at(number)
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            raise at.bad(f"{shown(line)} is not JSON; must be an object a line") from None
        if not isinstance(said, dict):
            raise at.bad(f"{shown(line)} is not allowed; must be a JSON object")
        for field in ("timestamp", "input_length", "output_length", "hash_ids"):
            if field not in said:
                raise at.bad(f"{field}: is missing")
        timestamp, ids = said["timestamp"], said["hash_ids"]
        if isinstance(timestamp, bool) or not isinstance(timestamp, int | float) or not 0 <= timestamp < 1e15:
            raise at.wrong("timestamp", timestamp, "milliseconds, 0 or more")
        tokens = at.tokens("input_length", said["input_length"])
        blocks = -(-tokens // HASH_TOKENS)
        if not isinstance(ids, list) or any(type(one) is not int or not 0 <= one < _OWN_IDS for one in ids):
            raise at.wrong("hash_ids", ids, "a list of whole numbers, 0 or more")
        if len(ids) != blocks:
            raise at.bad(f"hash_ids: has {len(ids)}; must have {blocks}, one for each {HASH_TOKENS} of input_length")
        yield TraceRequest(timestamp / 1e3, tokens, at.tokens("output_length", said["output_length"]), tuple(ids))


def _azure(text: str, line_at: Callable[[int], _Line]) -> Iterator[TraceRequest]:
    rows = csv.reader(io.StringIO(text, newline=""))
    header = False
    try:
        for row in rows:
            at = line_at(rows.line_num)
            if not row:
                continue
            if not header:
                if tuple(cell.strip() for cell in row) != AZURE_HEADER:
                    raise at.bad(
                        f"{shown(','.join(row))} is not allowed; must be the header {','.join(AZURE_HEADER)}, or a JSON"
                        " object a line"
                    )
                header = True
                continue
            if len(row) != len(AZURE_HEADER):
                raise at.bad(f"has {len(row)} fields; must have {len(AZURE_HEADER)}: {','.join(AZURE_HEADER)}")
            prompt, generated = (_count(at, *each) for each in zip(AZURE_HEADER[1:], row[1:], strict=True))
            yield TraceRequest(_seconds(at, row[0]), prompt, generated)
    except csv.Error as error:
        raise line_at(rows.line_num).bad(f"is not CSV: {error}") from error


def _seconds(at: _Line, cell: str) -> float:
    try:
        found = datetime.fromisoformat(cell.strip())
    except ValueError:
        raise at.wrong("TIMESTAMP", cell, "a time such as 2023-11-16 18:15:46.6805900") from None
    return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()


def _count(at: _Line, field: str, cell: str) -> int:
    text = cell.strip()
    return at.tokens(field, int(text) if text.isascii() and text.isdigit() and len(text) < 12 else cell)


def made_trace(seconds: float, rate: float, seed: int) -> list[TraceRequest]:
    """Arrivals at random, so many a second; lengths about those of a chat, without common prefixes."""
    rng, at_s, found = random.Random(seed), 0.0, list[TraceRequest]()
    while (at_s := at_s + rng.expovariate(rate)) < seconds:
        found.append(TraceRequest(at_s, 20 + int(rng.expovariate(1 / 400)), 4 + int(rng.expovariate(1 / 100))))
    return found


def within(requests: Sequence[TraceRequest], seconds: float | None) -> list[TraceRequest]:
    """Those of the first so many seconds."""
    return [request for request in requests if seconds is None or request.at_s < seconds]


def span_s(requests: Sequence[TraceRequest]) -> float:
    """How long a trace is."""
    return max((request.at_s for request in requests), default=0.0)


def scaled(requests: Sequence[TraceRequest], scale: float, seed: int) -> list[TraceRequest]:
    """So many times the load, in the same time and with the same bursts.

    Below 1 it is a share of the requests, drawn, with their times. Above 1 there are further copies, of other users:
    each has prefixes of its own, and is shifted round the trace's time by as much as is drawn, since bursts of
    different users do not fall together.
    """
    rng, span, found = random.Random(seed), span_s(requests), list[TraceRequest]()
    for copy in range(-(-int(scale * 1e6) // 1_000_000)):
        share, shift = min(1.0, scale - copy), rng.random() * span if copy else 0.0
        for request in requests:
            if share < 1 and rng.random() >= share:
                continue
            at_s = request.at_s + shift
            found.append(dataclasses.replace(request.of_others(copy), at_s=at_s - span if at_s > span else at_s))
    return sorted(found, key=lambda request: request.at_s)


class Prompts:
    """Token ids that have the common prefixes that a trace says, and no others."""

    def __init__(self) -> None:
        self._next = -1

    def of(self, request: TraceRequest) -> list[int]:
        tokens: list[int] = []
        for one in request.hash_ids:
            # The hash of a block of tokens includes all before it, so they need not differ within one.
            tokens += [one] * HASH_TOKENS
        del tokens[request.prompt_tokens :]
        return tokens or self.new(request.prompt_tokens)

    def new(self, tokens: int) -> list[int]:
        """A prompt like no other."""
        self._next -= 1
        return [self._next] * tokens


def hit_tokens(requests: Iterable[TraceRequest], capacity_tokens: float) -> int:
    """Tokens of prompts that one cache would have, least recently used out first, in blocks of 512.

    Args:
        capacity_tokens: what it holds; infinite is the most that any cache can have.
    """
    capacity, hits = capacity_tokens // HASH_TOKENS, 0
    # Least recently used first; Python's dicts keep their order. A block's id stands for all before it.
    held: dict[int, None] = {}
    for request in requests:
        whole = request.hash_ids[: request.prompt_tokens // HASH_TOKENS]
        found = next((i for i, one in enumerate(whole) if one not in held), len(whole))
        # The last token of a prompt is always computed.
        hits += min(found * HASH_TOKENS, request.prompt_tokens - 1)
        # The end of a prefix goes before its beginning, as in vLLM.
        for one in reversed(whole):
            held.pop(one, None)
            held[one] = None
        while len(held) > capacity:
            del held[next(iter(held))]
    return hits
