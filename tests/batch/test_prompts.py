from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from hycluster.batch.prompts import PRESETS, language_of, merge_messages, part_messages, prompt_of
from hycluster.errors import InvalidInput, SettingsError
from tests.batch.conftest import MakeJob

CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def content(make_job: MakeJob, row: dict[str, Any], columns: dict[str, str], **changes: Any) -> str:
    job = make_job(input={"path": "in", "columns": columns}, **changes)
    (message,) = prompt_of(job).messages(row)
    assert message["role"] == "user"
    return str(message["content"])


@pytest.mark.parametrize("task", sorted(PRESETS))
def test_presets_hold_the_text_as_it_is(make_job: MakeJob, task: str) -> None:
    question = {"question": "Who?"} if task == "ask" else {}
    said = content(make_job, {"body": "{braces} {0.__class__} stay"}, {"text": "body"}, task=task, **question)
    assert "{braces} {0.__class__} stay" in said
    assert ("Who?" in said) == (task == "ask")


def test_math_asks_for_a_box(make_job: MakeJob) -> None:
    assert "\\boxed{}" in content(make_job, {"t": "1+1"}, {"text": "t"}, task="math")


def test_ask_takes_a_question_from_each_row(make_job: MakeJob) -> None:
    said = content(make_job, {"t": "A text.", "q": "Why?"}, {"text": "t", "question": "q"}, task="ask")
    assert said.endswith("Text:\nA text.\n\nQuestion: Why?")


def test_a_template_names_columns_and_doubles_braces(make_job: MakeJob) -> None:
    said = content(make_job, {"title": "T", "year": 7, "b": "B"}, {"text": "b"}, prompt="{{{title}}} {year} {text}")
    assert said == "{T} 7 B"


@pytest.mark.parametrize("prompt", ["{", "a }", "{}", "{title!r}", "{title:>9}"])
def test_malformed_templates_are_refused(make_job: MakeJob, prompt: str) -> None:
    with pytest.raises(SettingsError, match=r"^prompt: "):
        prompt_of(make_job(prompt=prompt))


def test_attributes_and_indexes_are_column_names_that_do_not_exist(make_job: MakeJob) -> None:
    prompt = prompt_of(make_job(prompt="{text.__class__} {text[0]}"))
    with pytest.raises(SettingsError, match=r"in: no column 'text.__class__'; there are text"):
        prompt.check(pa.schema([("text", pa.string())]), "in")


@pytest.mark.parametrize(
    ("columns", "kind", "said"),
    [
        ({"text": "t"}, pa.int64(), "column 't' is int64; must be string"),
        ({"text": "t"}, pa.binary(), "column 't' is binary; must be string"),
        ({"messages": "t"}, pa.list_(pa.string()), r"column 't' is list<.*must be list<struct<role, content>>"),
        ({"messages": "t"}, pa.list_(pa.struct([("role", pa.string())])), r"must be list<struct<role, content>>"),
    ],
)
def test_wrong_types_are_refused(make_job: MakeJob, columns: dict[str, str], kind: pa.DataType, said: str) -> None:
    prompt = prompt_of(make_job(input={"path": "in", "columns": columns}))
    with pytest.raises(SettingsError, match=said):
        prompt.check(pa.schema([("t", kind)]), "in")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_all_kinds_of_text_are_taken(make_job: MakeJob, kind: pa.DataType) -> None:
    prompt_of(make_job()).check(pa.schema([("text", kind)]), "in")


def test_a_template_takes_no_nested_values(make_job: MakeJob) -> None:
    prompt = prompt_of(make_job(prompt="{tags}"))
    with pytest.raises(SettingsError, match="a template takes text, numbers and dates"):
        prompt.check(pa.schema([("text", pa.string()), ("tags", pa.list_(pa.string()))]), "in")


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_rows_without_text_are_refused(make_job: MakeJob, value: str | None) -> None:
    with pytest.raises(InvalidInput, match=r"text: is (null|empty)"):
        prompt_of(make_job()).messages({"text": value})


def test_chats_come_through_as_they_are(make_job: MakeJob) -> None:
    prompt = prompt_of(make_job(input={"path": "in", "columns": {"messages": "chat"}}))
    prompt.check(pa.schema([("chat", CHAT)]), "in")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert prompt.messages({"chat": chat}) == chat
    assert prompt.messages({"chat": json.dumps(chat)}) == chat
    assert prompt.messages({"chat": [{**chat[1], "name": None}]}) == [chat[1]]


@pytest.mark.parametrize(
    "value", [None, [], "no json", "{}", "[1]", [{"role": None, "content": "x"}], [{"role": "user", "content": None}]]
)
def test_what_is_no_chat_is_refused(make_job: MakeJob, value: Any) -> None:
    prompt = prompt_of(make_job(input={"path": "in", "columns": {"messages": "chat"}}))
    with pytest.raises(InvalidInput, match=r"^chat: "):
        prompt.messages({"chat": value})


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("", "en"),
        ("1234 !?", "en"),
        ("A text with one 字.", "en"),
        ("长江很长，黄河也很长。", "zh"),
        ("这个 API 返回 token 的数量。", "zh"),
        ("これは日本語の文章です。", "en"),
    ],
)
def test_language(text: str, language: str) -> None:
    assert language_of(text) == language


def test_texts_of_parts_are_taken_as_they_are() -> None:
    (message,) = part_messages("{text} {0} }{", 2, 3, "en")
    assert message["content"].endswith("Part 2 of 3:\n{text} {0} }{")
    (message,) = merge_messages(["{one}", "two"], "zh")
    assert message["content"].endswith("\n{one}\n\ntwo")


def test_a_kept_tree_needs_its_column(make_job: MakeJob) -> None:
    schema = pa.schema([("text", pa.string()), ("tree", pa.string())])
    prompt_of(make_job(task="summarize")).check(schema, "in")
    with pytest.raises(SettingsError, match="in: column 'tree' has a name that the output uses; rename it"):
        prompt_of(make_job(task="summarize", summary={"keep_tree": True})).check(schema, "in")
