"""From a row to the chat messages that ask for its output.

A template's placeholders are column names: ``{title}``; ``{text}`` is ``input.columns.text`` where that
is set. Literal braces are doubled: ``{{`` and
``}}``. Nothing else of Python's format language is allowed (no attributes, indexes, conversions
or format specs), so a job file can't reach into objects.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.types as pat

from hycluster.batch.job import Job
from hycluster.batch.refusal import ColumnRefused, Reason, RowRefused
from hycluster.errors import SettingsError, shown

Messages = list[dict[str, Any]]
Row = Mapping[str, Any]
Language = Literal["en", "zh"]

# Part of a job's fingerprint: raise it when a preset's words change.
VERSION = 3

PRESETS = {
    "summarize": "Summarize the following text in a few sentences. Keep names and numbers.\n\nText:\n{text}",
    "rewrite": "Rewrite the following text in clear and simple words. Keep all facts.\n\nText:\n{text}",
    "outline": "Write an outline of the following text as headings with short bullet points.\n\nText:\n{text}",
    "ask": "Answer the question from the text.\n\nText:\n{text}\n\nQuestion: {question}",
    "math": "Solve the problem step by step. Put the final answer in \\boxed{{}}.\n\nProblem:\n{text}",
    "code": "Write code that does what is asked. Answer with the code only.\n\nTask:\n{text}",
}

# The same for a Chinese text: asked in English, models answer many of them in English.
PRESETS_ZH = {
    "summarize": "请用几句话概括下面的文字。保留人名、地名和数字。\n\n文字：\n{text}",
    "rewrite": "请用简单明白的话改写下面的文字。保留所有事实。\n\n文字：\n{text}",
    "outline": "请为下面的文字写一份提纲，用标题和简短的要点。\n\n文字：\n{text}",
    "ask": "请根据下面的文字回答问题。\n\n文字：\n{text}\n\n问题：{question}",
    "math": "请一步一步解答下面的题目。把最后的答案写在 \\boxed{{}} 里。\n\n题目：\n{text}",
    "code": "请按要求编写代码。只回答代码。\n\n任务：\n{text}",
}

# For texts that are longer than the context (``hycluster/batch/summaries/summarizer.py``).
PART = {
    "en": (
        "Summarize the following part of a longer text in a few sentences. Keep names and numbers.\n\n"
        "Part {number} of {parts}:\n{text}"
    ),
    "zh": (
        "请用几句话概括下面这段文字，它是一篇长文的一部分。保留人名、地名和数字。\n\n"
        "第 {number} 部分，共 {parts} 部分：\n{text}"
    ),
}
MERGE = {
    "en": (
        "The following are summaries of consecutive parts of one text. Write one summary of the whole text from them, "
        "in a few sentences. Keep names and numbers.\n\nSummaries:\n{text}"
    ),
    "zh": (
        "以下是同一篇文章各个连续部分的摘要。请据此写出全文的摘要，用几句话。保留人名、地名和数字。\n\n"
        "各部分摘要：\n{text}"
    ),
}
SEPARATOR = "\n\n"
# How much of a text is looked at to tell its language.
SAMPLE_CHARACTERS = 10_000


class Prompt(Protocol):
    """Makes messages from rows.

    Attributes:
        columns: the input columns that it reads.
    """

    columns: tuple[str, ...]

    def messages(self, row: Row) -> Messages:
        """OpenAI's chat messages for one row, given the values of ``columns``.

        Raises:
            RowRefused: this row can't be asked: a value is null, empty or no chat.
        """

    def check(self, schema: pa.Schema, where: str) -> None:
        """Refuse a schema whose rows can't be asked.

        Raises:
            ColumnRefused: names the file (``where``), the column and what there is.
            SettingsError: the schema is one that no file may have.
        """


def prompt_of(job: Job) -> Prompt:
    """The prompt of a job.

    Raises:
        SettingsError: the template is malformed.
    """
    prompt, sampled = _asked(job), job.input.columns.sampling
    return SampledPrompt(prompt, tuple(dict.fromkeys(sampled.values()))) if sampled else prompt


def _asked(job: Job) -> Prompt:
    columns = job.input.columns
    if columns.messages is not None:
        return ChatPrompt(columns.messages)
    template = job.prompt or PRESETS.get(job.task, "{text}")
    chinese = PRESETS_ZH.get(job.task) if job.prompt is None else None
    if job.prompt is not None and not job.constant_prompt and not any(name for _, name in _parse(template)):
        raise SettingsError(
            f"prompt: {shown(template)} names no column, so every row would be asked the same; write a column as"
            " '{text}', or say constant_prompt: true if that is meant"
        )
    aliases = {"text": columns.text, "question": columns.question}
    constants = {"question": job.question} if job.question is not None else {}
    named = {k: v for k, v in aliases.items() if v is not None}
    if chinese is not None:
        return PresetPrompt({"en": template, "zh": chinese}, named, constants)
    return TemplatePrompt(template, named, constants)


def summary_messages(text: str) -> Messages:
    """Ask for the summary of a text that is one part."""
    presets = PRESETS_ZH if language_of(text) == "zh" else PRESETS
    return [{"role": "user", "content": presets["summarize"].format(text=text)}]


def language_of(text: str) -> Language:
    """Chinese if at least a fifth of the letters at its beginning are Han (and none of them kana); else English."""
    sample = text[:SAMPLE_CHARACTERS]
    letters = sum(map(str.isalpha, sample))
    han = sum("\u4e00" <= character <= "\u9fff" for character in sample)
    kana = any("\u3040" <= character <= "\u30ff" for character in sample)
    return "zh" if han and 5 * han >= letters and not kana else "en"


def part_messages(text: str, number: int, parts: int, language: Language) -> Messages:
    """Ask for the summary of one of several parts, counted from 1."""
    return [{"role": "user", "content": PART[language].format(number=number, parts=parts, text=text)}]


def merge_messages(summaries: Sequence[str], language: Language) -> Messages:
    """Ask for one summary of the summaries of consecutive parts."""
    return [{"role": "user", "content": MERGE[language].format(text=SEPARATOR.join(summaries))}]


class TemplatePrompt:
    """One user message from a template.

    Args:
        aliases: placeholders that stand for another column.
        constants: placeholders that stand for a text.
    """

    def __init__(self, template: str, aliases: Mapping[str, str], constants: Mapping[str, str]) -> None:
        self._parts: list[tuple[str, str | None]] = []
        named = []
        for literal, name in _parse(template):
            if name is None or name in constants:
                self._parts.append((literal + (constants[name] if name else ""), None))
            else:
                column = aliases.get(name, name)
                self._parts.append((literal, column))
                named.append(column)
        # A column that the job names must be there even if the template does not use it.
        self.columns = tuple(dict.fromkeys([*named, *aliases.values()]))
        self._strings = frozenset(aliases.values())
        self._named = {column: f"input.columns.{name}" for name, column in aliases.items()}

    def messages(self, row: Row) -> Messages:
        pieces = []
        for literal, column in self._parts:
            pieces.append(literal)
            if column is not None:
                value = row[column]
                if value is None:
                    raise RowRefused(Reason.NULL_VALUE, f"{column}: is null")
                text = value if isinstance(value, str) else str(value)
                if column in self._strings and not text.strip():
                    raise RowRefused(Reason.EMPTY_VALUE, f"{column}: is empty")
                pieces.append(text)
        content = "".join(pieces)
        if not content.strip():
            raise RowRefused(Reason.EMPTY_VALUE, "prompt: is empty for this row")
        return [{"role": "user", "content": content}]

    def check(self, schema: pa.Schema, where: str) -> None:
        for column in self.columns:
            kind = column_type(schema, column, where, self._named.get(column, ""))
            if column in self._strings and not _is_string(kind):
                raise ColumnRefused(Reason.WRONG_TYPE, f"{where}: column {column!r} is {kind}; must be string")
            if pat.is_nested(kind) or _is_bytes(kind):
                raise ColumnRefused(
                    Reason.WRONG_TYPE, f"{where}: column {column!r} is {kind}; a template takes text, numbers and dates"
                )
            if pat.is_timestamp(kind) and kind.tz is not None and not _is_known_zone(kind.tz):
                raise ColumnRefused(
                    Reason.WRONG_TYPE, f"{where}: column {column!r} is {kind}; there is no time zone {kind.tz!r} here"
                )


class PresetPrompt:
    """One user message from a preset, in the language of the row's text.

    Args:
        templates: of the same placeholders, ``{text}`` among them.
        aliases, constants: as for :class:`TemplatePrompt`.
    """

    def __init__(
        self, templates: Mapping[Language, str], aliases: Mapping[str, str], constants: Mapping[str, str]
    ) -> None:
        self._prompts = {
            language: TemplatePrompt(template, aliases, constants) for language, template in templates.items()
        }
        self._text = aliases.get("text", "text")
        self.columns = self._prompts["en"].columns

    def messages(self, row: Row) -> Messages:
        text = row[self._text]
        return self._prompts[language_of(text) if isinstance(text, str) else "en"].messages(row)

    def check(self, schema: pa.Schema, where: str) -> None:
        self._prompts["en"].check(schema, where)


class ChatPrompt:
    """A column that already holds the messages."""

    def __init__(self, column: str) -> None:
        self.columns: tuple[str, ...] = (column,)

    def messages(self, row: Row) -> Messages:
        (column,) = self.columns
        value = _said(row[column])
        if value is None:
            raise RowRefused(Reason.NULL_VALUE, f"{column}: is null")
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise RowRefused(Reason.INVALID_MESSAGES, f"{column}: is not JSON: {error}") from None
        if not isinstance(value, list) or not value:
            raise RowRefused(Reason.INVALID_MESSAGES, f"{column}: must be a list of messages that is not empty")
        for position, message in enumerate(value):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise RowRefused(
                    Reason.INVALID_MESSAGES, f"{column}: message {position} must have a role and a content"
                )
            # An assistant that calls tools need not say anything, as with OpenAI.
            if message.get("content") is None and not message.get("tool_calls"):
                raise RowRefused(Reason.INVALID_MESSAGES, f"{column}: message {position} has no content")
        return [{key: item for key, item in message.items() if item is not None} for message in value]

    def check(self, schema: pa.Schema, where: str) -> None:
        (column,) = self.columns
        kind = column_type(schema, column, where, "input.columns.messages")
        if _is_string(kind):
            return
        if not _is_list(kind) or not pat.is_struct(kind.value_type) or _lacks(kind.value_type, "role", "content"):
            raise ColumnRefused(
                Reason.WRONG_TYPE,
                f"{where}: column {column!r} is {kind}; must be list<struct<role, content>> or JSON text",
            )


class SampledPrompt:
    """A prompt, and the columns that each row's own sampling is in."""

    def __init__(self, prompt: Prompt, columns: tuple[str, ...]) -> None:
        self._prompt = prompt
        self._sampled = columns
        self.columns: tuple[str, ...] = tuple(dict.fromkeys([*prompt.columns, *columns]))

    def messages(self, row: Row) -> Messages:
        return self._prompt.messages(row)

    def check(self, schema: pa.Schema, where: str) -> None:
        self._prompt.check(schema, where)
        for column in self._sampled:
            kind = column_type(schema, column, where, "input.columns.sampling")
            if not (pat.is_integer(kind) or pat.is_floating(kind) or pat.is_null(kind)):
                raise ColumnRefused(Reason.WRONG_TYPE, f"{where}: column {column!r} is {kind}; must be a number")


def column_type(schema: pa.Schema, column: str, where: str, setting: str = "") -> pa.DataType:
    """Type of a column of the input; a dictionary column has the type of its values, JSON is text.

    Args:
        setting: that names the column, if it is not the prompt.

    Raises:
        ColumnRefused: there is none, or there are several.
    """
    found = schema.get_all_field_indices(column)
    if not found:
        there = ", ".join(schema.names) or "none"
        named = f", which {setting} names" if setting else ""
        raise ColumnRefused(Reason.MISSING_COLUMN, f"{where}: no column {column!r}{named}; there are {there}")
    if len(found) > 1:
        there = ", ".join(schema.names)
        raise ColumnRefused(Reason.WRONG_TYPE, f"{where}: {len(found)} columns named {column!r}; there are {there}")
    kind = schema.field(found[0]).type
    if isinstance(kind, pa.JsonType | pa.FixedShapeTensorType):
        kind = kind.storage_type
    return kind.value_type if pat.is_dictionary(kind) else kind


def _said(value: Any) -> Any:
    """A struct column gives every message, and all within it, every field; those left null were never said."""
    if isinstance(value, list):
        return [_said(item) for item in value]
    if isinstance(value, dict):
        return {key: _said(item) for key, item in value.items() if item is not None}
    return value


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Pairs of literal text and the placeholder that follows it."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise SettingsError(f"prompt: {error}; write a literal brace as '{{{{' or '}}}}'") from None
    result = []
    for literal, name, spec, conversion in parts:
        if name == "":
            raise SettingsError("prompt: '{}' names no column; write a literal pair of braces as '{{}}'")
        if spec or conversion:
            raise SettingsError(f"prompt: {name!r}: formats and conversions are not allowed; only {{column}}")
        result.append((literal, name))
    return result


def _is_string(kind: pa.DataType) -> bool:
    return bool(pat.is_string(kind) or pat.is_large_string(kind) or pat.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    is_any = (pat.is_binary, pat.is_large_binary, pat.is_binary_view, pat.is_fixed_size_binary)
    return any(is_one(kind) for is_one in is_any)


def _is_list(kind: pa.DataType) -> bool:
    is_any = (pat.is_list, pat.is_large_list, pat.is_fixed_size_list, pat.is_list_view, pat.is_large_list_view)
    return any(is_one(kind) for is_one in is_any)


def _is_known_zone(name: str) -> bool:
    try:
        pa.scalar(0, pa.timestamp("s", tz=name)).as_py()
    except Exception:
        # Of whatever kind: that depends on which package looks for it.
        return False
    return True


def _lacks(struct: pa.DataType, *names: str) -> bool:
    return any(struct.get_field_index(name) < 0 for name in names)
