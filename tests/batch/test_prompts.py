from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from hycluster.batch.prompts import (
    PRESETS,
    PRESETS_ZH,
    language_of,
    merge_messages,
    part_messages,
    prompt_of,
    summary_messages,
)
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
    ("changes", "said"),
    [
        ({"task": "rewrite"}, "no column 'text', which input.columns.text names; there are id"),
        ({"prompt": "{id} {words}", "input": {"path": "x"}}, "no column 'words'; there are id"),
    ],
)
def test_a_column_that_is_missing_is_told_with_who_names_it(
    make_job: MakeJob, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=f"^in: {said}$"):
        prompt_of(make_job(**changes)).check(pa.schema([("id", pa.int64())]), "in")


@pytest.mark.parametrize(
    ("columns", "kind", "said"),
    [
        ({"text": "t"}, pa.int64(), "column 't' is int64; must be string"),
        ({"text": "t"}, pa.binary(), "column 't' is binary; must be string"),
        ({"messages": "t"}, pa.list_(pa.string()), r"column 't' is list<.*must be list<struct<role, content>>"),
        ({"messages": "t"}, pa.list_(pa.struct([("role", pa.string())])), r"must be list<struct<role, content>>"),
        ({"messages": "t"}, pa.list_(pa.string(), 2), r"must be list<struct<role, content>>"),
    ],
)
def test_wrong_types_are_refused(make_job: MakeJob, columns: dict[str, str], kind: pa.DataType, said: str) -> None:
    prompt = prompt_of(make_job(input={"path": "in", "columns": columns}))
    with pytest.raises(SettingsError, match=said):
        prompt.check(pa.schema([("t", kind)]), "in")


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.json_(),
        pa.json_(pa.large_string()),
    ],
)
def test_all_kinds_of_text_are_taken(make_job: MakeJob, kind: pa.DataType) -> None:
    prompt_of(make_job()).check(pa.schema([("text", kind)]), "in")


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.string()), pa.binary(4), pa.binary_view(), pa.fixed_shape_tensor(pa.int8(), [2])]
)
def test_a_template_takes_no_nested_values_and_no_bytes(make_job: MakeJob, kind: pa.DataType) -> None:
    prompt = prompt_of(make_job(prompt="{tags}"))
    with pytest.raises(SettingsError, match="a template takes text, numbers and dates"):
        prompt.check(pa.schema([("text", pa.string()), ("tags", kind)]), "in")


@pytest.mark.parametrize("kind", [pa.uuid(), pa.timestamp("us", tz="Europe/Berlin"), pa.float32(), pa.bool8()])
def test_a_template_takes_what_reads_as_text(make_job: MakeJob, kind: pa.DataType) -> None:
    prompt_of(make_job(prompt="{tags}")).check(pa.schema([("text", pa.string()), ("tags", kind)]), "in")


def test_a_time_zone_that_nobody_knows_is_named(make_job: MakeJob) -> None:
    prompt = prompt_of(make_job(prompt="{when}"))
    schema = pa.schema([("text", pa.string()), ("when", pa.timestamp("us", tz="Mars/Olympus"))])
    with pytest.raises(SettingsError, match=r"column 'when' is .*; there is no time zone 'Mars/Olympus' here"):
        prompt.check(schema, "in")


def test_a_prompt_that_names_no_column_must_be_meant(make_job: MakeJob) -> None:
    with pytest.raises(SettingsError, match=r"^prompt: 'Say {{hi}}!' names no column, .*constant_prompt: true"):
        prompt_of(make_job(prompt="Say {{hi}}!"))
    (message,) = prompt_of(make_job(prompt="Say {{hi}}!", constant_prompt=True)).messages({"text": "t"})
    assert message["content"] == "Say {hi}!"


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


@pytest.mark.parametrize("made", [pa.list_, pa.large_list, pa.list_view, lambda kind: pa.list_(kind, 2)])
def test_chats_come_in_lists_of_any_kind(make_job: MakeJob, made: Callable[[pa.DataType], pa.DataType]) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    column = pa.array([chat], made(CHAT.value_type))
    prompt = prompt_of(make_job(input={"path": "in", "columns": {"messages": "chat"}}))
    prompt.check(pa.schema([("chat", column.type)]), "in")
    assert prompt.messages({"chat": column[0].as_py()}) == chat


def test_an_assistant_that_calls_tools_need_not_say_anything(make_job: MakeJob) -> None:
    prompt = prompt_of(make_job(input={"path": "in", "columns": {"messages": "chat"}}))
    call: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "seen", "tool_call_id": "1"},
    ]
    assert prompt.messages({"chat": json.dumps([chat[0], {**chat[1], "content": None}, chat[2]])}) == chat
    # As a column of structs has it: every message has every field, and so has all within it.
    full = [
        {"content": [{"type": "text", "text": "Hi", "image": None}], "role": "user", "tool_calls": None},
        {"content": None, "role": "assistant", "tool_calls": [{**call, "index": None}]},
        {"content": "seen", "role": "tool", "tool_call_id": "1", "tool_calls": None},
    ]
    assert prompt.messages({"chat": full}) == chat


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


@pytest.mark.parametrize("task", sorted(PRESETS))
def test_a_chinese_text_is_asked_about_in_chinese(make_job: MakeJob, task: str) -> None:
    question = {"question": "谁？"} if task == "ask" else {}
    text = "长城是中国古代的军事防御工程，{花括号}不变。"
    said = content(make_job, {"body": text}, {"text": "body"}, task=task, **question)
    assert text in said
    assert language_of(said.replace(text, "")) == "zh"
    english = content(make_job, {"body": "A wall."}, {"text": "body"}, task=task, **question)
    assert language_of(english.replace("谁？", "")) == "en"


def test_presets_are_the_same_in_both_languages() -> None:
    def holes(template: str) -> list[str]:
        return re.findall(r"\{+\w*\}+", template)

    assert {task: holes(text) for task, text in PRESETS.items()} == {t: holes(text) for t, text in PRESETS_ZH.items()}


def test_a_prompt_of_ones_own_stays_as_it_is(make_job: MakeJob) -> None:
    assert content(make_job, {"b": "长城"}, {"text": "b"}, prompt="Say: {text}") == "Say: 长城"


def test_a_short_document_is_asked_about_in_its_language() -> None:
    (chinese,), (english,) = summary_messages("长城很长。"), summary_messages("It is long.")
    assert (chinese["content"][0], english["content"][0]) == ("请", "S")


def test_a_row_that_is_null_is_refused_by_a_preset_too(make_job: MakeJob) -> None:
    with pytest.raises(InvalidInput, match="b: is null"):
        content(make_job, {"b": None}, {"text": "b"}, task="summarize")
