"""A batch's JSONL, checked line by line and turned into the Parquet input of a job.

A line that is no request at all fails the whole batch before anything is asked, as with OpenAI. What is
wrong inside a request's body is that line's own answer, see lines.py.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hycluster.batch_api.records import LineError
from hycluster.errors import InvalidInput, shown, too_many_members
from hycluster.ingress.json_shape import JsonShape
from hycluster.settings.load import MAX_MEMBERS
from hycluster.storage import Folder

CUSTOM_ID = "custom_id"
BODY = "body"
SCHEMA = pa.schema([(CUSTOM_ID, pa.string()), (BODY, pa.string())])

# As much as the HTTP ingress takes for one request.
MAX_LINE_BYTES = 32 << 20
MAX_CUSTOM_ID = 512
# A file that is wrong in every line is told from its first ones.
MAX_ERRORS = 100
GROUP_BYTES = 16 << 20
# Of a line, looked at in one go: nothing else runs meanwhile.
PIECE_BYTES = 64 << 10
KEYS = (CUSTOM_ID, "method", "url", BODY)


class Refused(InvalidInput):
    """A batch's input can't be run; ``errors`` says why, line by line."""

    def __init__(self, errors: list[LineError]) -> None:
        super().__init__(errors[0].message)
        self.errors = tuple(errors)

    def __reduce__(self) -> tuple[type[Refused], tuple[list[LineError]]]:
        return Refused, (list(self.errors),)


@dataclass(frozen=True, slots=True)
class Checked:
    """What a good input holds. ``model`` is the one that all lines name; None if they differ or name none."""

    lines: int
    model: str | None


def convert(
    content: Any, file: Folder, *, endpoint: str, max_lines: int, group_lines: int, max_members: int = MAX_MEMBERS
) -> Checked:
    """Read JSONL and write one Parquet file, in constant memory but for a digest of each ``custom_id``.

    Args:
        max_members: of a line (:class:`JsonShape`); it is not read as JSON if there are more.
        content: a binary file, read once.
        file: the Parquet file, columns ``custom_id`` and ``body`` (JSON); overwritten.
        group_lines: rows of a row group.

    Raises:
        Refused: names up to ``MAX_ERRORS`` lines; what is in ``file`` then is worth nothing.
    """
    checker = _Checker(endpoint, max_members)
    with pq.ParquetWriter(file.root, SCHEMA, filesystem=file.filesystem) as writer:
        group: list[dict[str, str]] = []
        group_bytes = 0
        for number, line in _lines(content):
            if checker.lines == max_lines:
                message = f"the file has more than {max_lines} requests, the most of one batch; split it"
                checker.errors.append(LineError(code="too_many_requests", message=message))
                break
            row = checker.check(number, line)
            if len(checker.errors) >= MAX_ERRORS:
                break
            if row is None or checker.errors:
                continue
            group.append(row)
            group_bytes += len(line)
            if len(group) == group_lines or group_bytes >= GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA), row_group_size=group_lines)
                group, group_bytes = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, SCHEMA), row_group_size=group_lines)
    if not checker.lines and not checker.errors:
        checker.errors.append(LineError(code="empty_file", message="the file has no requests"))
    if checker.errors:
        raise Refused(checker.errors)
    return Checked(checker.lines, checker.models.pop() if len(checker.models) == 1 else None)


def _lines(content: Any) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1; blank ones are skipped, one that is too long is cut short."""
    reader = io.BufferedReader(content, 1 << 20)
    number = 0
    while line := reader.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            yield number, line
            while line and not line.endswith(b"\n"):
                line = reader.readline(MAX_LINE_BYTES)
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


@dataclass(slots=True)
class _Checker:
    endpoint: str
    max_members: int
    lines: int = 0
    models: set[str | None] = field(default_factory=set)
    errors: list[LineError] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)

    def check(self, number: int, line: bytes) -> dict[str, str] | None:
        """The row of a line; None if it is wrong, with the reason in ``errors``."""
        self.lines += 1
        found = self._problem(line)
        if isinstance(found, dict):
            return found
        code, message, param = found
        self.errors.append(LineError(code=code, message=message, line=number, param=param))
        return None

    def _problem(self, line: bytes) -> dict[str, str] | tuple[str, str, str | None]:
        if len(line) > MAX_LINE_BYTES:
            return "line_too_long", f"is longer than {MAX_LINE_BYTES} bytes, the most of one request", None
        if self._members(line) > self.max_members:
            return "too_many_members", too_many_members("line", self.max_members).message, None
        try:
            asked = json.loads(line)
        except UnicodeDecodeError:
            return "invalid_json_line", "is not text in UTF-8", None
        except (ValueError, RecursionError) as error:
            return "invalid_json_line", f"is not JSON: {error}", None
        if not isinstance(asked, dict):
            return "invalid_json_line", "must be a JSON object with custom_id, method, url and body", None
        for key in KEYS:
            if asked.get(key) is None:
                return "missing_required_parameter", f"{key}: is missing", key
        custom_id, method, url, body = (asked[key] for key in KEYS)
        if not _is_name(custom_id):
            message = f"custom_id: {shown(custom_id)} is not allowed; must be a text of 1 to {MAX_CUSTOM_ID} characters"
            return "invalid_custom_id", message, CUSTOM_ID
        if method != "POST":
            return "invalid_method", f"method: {shown(method)} is not allowed; must be 'POST'", "method"
        if url != self.endpoint:
            return "invalid_url", f"url: {shown(url)} is not the batch's endpoint, {self.endpoint!r}", "url"
        if not isinstance(body, dict):
            return "invalid_body", f"body: must be a JSON object, not {type(body).__name__}", BODY
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        if digest in self.seen:
            return "duplicate_custom_id", f"custom_id: {shown(custom_id)} is that of an earlier line too", CUSTOM_ID
        self.seen.add(digest)
        if len(self.models) < 2:
            model = body.get("model")
            self.models.add(model if isinstance(model, str) else None)
        return {CUSTOM_ID: custom_id, BODY: json.dumps(body)}

    def _members(self, line: bytes) -> int:
        shape = JsonShape()
        for start in range(0, len(line), PIECE_BYTES):
            if shape.members > self.max_members:
                break
            shape.feed(line[start : start + PIECE_BYTES])
        return shape.members


def _is_name(custom_id: object) -> bool:
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        return False
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair.
        return False
    return True
