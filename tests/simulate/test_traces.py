from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from hycluster.errors import SettingsError
from hycluster.simulate.traces import Prompts, TraceRequest, hit_tokens, read_trace, scaled, span_s, within

LINE = {"timestamp": 1500, "input_length": 700, "output_length": 9, "hash_ids": [4, 8]}
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE = HEADER + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"


def line(**changed: Any) -> str:
    return json.dumps({key: value for key, value in {**LINE, **changed}.items() if value is not ...}) + "\n"


def put(folder: Path, content: str | bytes, packed: bool = False) -> Path:
    path = folder / "trace"
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_mooncakes_lines(tmp_path: Path, packed: bool) -> None:
    found = read_trace(put(tmp_path, line() + "\n" + line(timestamp=1000, hash_ids=[4], input_length=512), packed))
    assert found == [TraceRequest(0.0, 512, 9, (4,)), TraceRequest(0.5, 700, 9, (4, 8))], "in order of time"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_azures_rows(tmp_path: Path, packed: bool, ending: str) -> None:
    first, second = read_trace(put(tmp_path, AZURE.replace("\n", ending), packed))
    assert (first.at_s, first.prompt_tokens, first.output_tokens, first.hash_ids) == (0.0, 374, 44, ())
    assert second.at_s == pytest.approx(4.314579, abs=1e-5)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (line() + line(input_length=0), "line 2: input_length: 0 is not allowed; must be a whole number from 1 to "),
        (line(output_length=1.5), "line 1: output_length: 1.5 is not allowed; must be a whole number"),
        (line(output_length=True), "line 1: output_length: True is not allowed"),
        (line(timestamp="1"), "line 1: timestamp: '1' is not allowed; must be milliseconds, 0 or more"),
        (line(timestamp=-1), "line 1: timestamp: -1 is not allowed"),
        (line(timestamp=math.nan), "line 1: timestamp: nan is not allowed"),
        (line(hash_ids=[1]), "line 1: hash_ids: has 1; must have 2, one for each 512 of input_length"),
        (line(hash_ids=[1, "2"]), "line 1: hash_ids: [1, '2'] is not allowed; must be a list of whole numbers"),
        (line(hash_ids=...), "line 1: hash_ids: is missing"),
        (line() + "\n{'a'\n", "line 3: \"{'a'\" is not JSON; must be an object a line"),
        (line() + "7\n", "line 2: '7' is not allowed; must be a JSON object"),
        (AZURE + "yesterday,1,1\n", "line 4: TIMESTAMP: 'yesterday' is not allowed; must be a time such as "),
        (AZURE + "2023-11-16 18:15:46,-3,1\n", "line 4: ContextTokens: '-3' is not allowed; must be a whole number"),
        (AZURE + "2023-11-16 18:15:46,3,0\n", "line 4: GeneratedTokens: 0 is not allowed"),
        (AZURE + "2023-11-16 18:15:46,3\n", "line 4: has 2 fields; must have 3: TIMESTAMP,"),
        ("when,in,out\n1,2,3\n", "line 1: 'when,in,out' is not allowed; must be the header TIMESTAMP,"),
        (HEADER, "has no requests, only a header"),
        ("\n\n", "is empty; must be a trace"),
        (b"\xff\xfe{}", "is not text in UTF-8"),
        (gzip.compress(line().encode(), mtime=0)[:-9], "is not a whole gzip file"),
    ],
)
def test_a_bad_line_is_named_and_refused(tmp_path: Path, content: str | bytes, says: str) -> None:
    path = put(tmp_path, content)
    with pytest.raises(SettingsError) as caught:
        read_trace(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert says in caught.value.message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        read_trace(tmp_path / "none")
    with pytest.raises(SettingsError, match="can't be read"):
        read_trace(tmp_path)


def some(count: int = 2000) -> list[TraceRequest]:
    return [TraceRequest(number * 0.5, 600, 5, (number // 2, 10_000 + number)) for number in range(count)]


def test_less_load_is_fewer_requests_at_their_times() -> None:
    requests = some()
    less = scaled(requests, 0.3, seed=1)
    assert 500 < len(less) < 700
    assert set(less) <= set(requests)
    assert less == scaled(requests, 0.3, seed=1) != scaled(requests, 0.3, seed=2)
    assert scaled(requests, 1, seed=1) == requests


def test_more_load_is_other_users_in_the_same_time() -> None:
    requests = some()
    more = scaled(requests, 2.5, seed=1)
    assert len(more) == pytest.approx(5000, rel=0.05)
    assert span_s(more) <= span_s(requests)
    assert [each.at_s for each in more] == sorted(each.at_s for each in more)
    assert set(requests) <= set(more), "the first ones are as they were"
    twice = hit_tokens(scaled(requests, 2, seed=1), math.inf)
    assert twice == 2 * hit_tokens(requests, math.inf), "no prefix in common"


def test_only_its_begin() -> None:
    assert len(within(some(), 10)) == 20
    assert within(some(), None) == some()


def test_prompts_begin_alike_as_far_as_the_trace_says() -> None:
    prompts = Prompts()
    one, other, own, own_too = (prompts.of(TraceRequest(0, 1100, 1, ids)) for ids in ((1, 2, 3), (1, 2, 4), (), ()))
    assert [len(each) for each in (one, other, own, own_too)] == [1100] * 4
    common = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    assert common == 1024
    assert own[0] != own_too[0] != one[0] != own[0]


def test_what_a_cache_can_have() -> None:
    requests = [TraceRequest(0, 1024, 1, ids) for ids in ((1, 2), (3, 4), (1, 2), (1, 5))]
    assert hit_tokens(requests, math.inf) == 1023 + 512
    assert hit_tokens(requests, 4 * 512) == 1023 + 512
    assert hit_tokens(requests, 3 * 512) == 512 + 512, "of the oldest prefix its end has gone"
    assert hit_tokens(requests, 0) == 0
