from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hycluster.batch_api import requests
from hycluster.batch_api.records import LineError
from hycluster.batch_api.requests import Checked, Refused, convert
from tests.batch_api.stand_in import ENDPOINT, jsonl, line
from tests.located import at


def run(path: Path, text: str | bytes, **changes: Any) -> Checked:
    content = io.BytesIO(text if isinstance(text, bytes) else text.encode())
    given: dict[str, Any] = {"endpoint": ENDPOINT, "max_lines": 100, "group_lines": 8} | changes
    return convert(content, at(path / "lines.parquet"), **given)


def refused(path: Path, text: str | bytes, **changes: Any) -> tuple[LineError, ...]:
    with pytest.raises(Refused) as refusal:
        run(path, text, **changes)
    return refusal.value.errors


def test_lines_become_rows_in_order(tmp_path: Path) -> None:
    assert run(tmp_path, jsonl(20)) == Checked(20, "m")
    table = pq.read_table(tmp_path / "lines.parquet")
    assert table.column("custom_id").to_pylist() == [f"c{n}" for n in range(20)]
    assert [json.loads(body)["prompt"] for body in table.column("body").to_pylist()] == [f"p{n}" for n in range(20)]
    assert pq.ParquetFile(tmp_path / "lines.parquet").num_row_groups == 3


def test_blank_lines_bom_windows_line_ends_and_no_last_one(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + f"{line('a')}\r\n\n   \n{line('b')}".encode()
    assert run(tmp_path, text).lines == 2


def test_text_of_any_kind_comes_through(tmp_path: Path) -> None:
    body = {"model": "m", "prompt": '好\ud800\u2028 "q"'}
    run(tmp_path, line("é", body=body))
    (row,) = pq.read_table(tmp_path / "lines.parquet").to_pylist()
    assert row["custom_id"] == "é"
    assert json.loads(row["body"]) == body


@pytest.mark.parametrize(
    ("models", "shown"), [(("m", "m"), "m"), (("m", "n"), None), ((None, None), None), (("m", None), None)]
)
def test_the_model_of_all(tmp_path: Path, models: tuple[str | None, ...], shown: str | None) -> None:
    text = "\n".join(line(f"c{n}", body={"model": model}) for n, model in enumerate(models))
    assert run(tmp_path, text).model == shown


@pytest.mark.parametrize(
    ("wrong", "code", "param", "says"),
    [
        ("{", "invalid_json_line", None, "not JSON"),
        ('{"custom_id": ' + "[" * 10_000, "invalid_json_line", None, "not JSON"),
        ("[1]", "invalid_json_line", None, "JSON object"),
        (line("x", body=None), "missing_required_parameter", "body", "body: is missing"),
        ('{"method": "POST"}', "missing_required_parameter", "custom_id", "custom_id: is missing"),
        (line("x", custom_id=7), "invalid_custom_id", "custom_id", "7"),
        (line("x", custom_id=""), "invalid_custom_id", "custom_id", "1 to 512"),
        (line("x", custom_id="\ud800"), "invalid_custom_id", "custom_id", "not allowed"),
        (line("x", method="GET"), "invalid_method", "method", "'GET'"),
        (line("x", url="/v1/completions"), "invalid_url", "url", "'/v1/completions' is not the batch's endpoint"),
        (line("x", body=[1]), "invalid_body", "body", "list"),
        (line("good"), "duplicate_custom_id", "custom_id", "'good'"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path: Path, wrong: str, code: str, param: str | None, says: str) -> None:
    (error,) = refused(tmp_path, f"{line('good')}\n\n{wrong}\n{line('after')}\n")
    assert (error.code, error.line, error.param) == (code, 3, param)
    assert says in error.message


def test_what_is_not_utf_8(tmp_path: Path) -> None:
    (error,) = refused(tmp_path, line("a").encode() + b'\n{"custom_id": "\xff"}\n')
    assert (error.code, error.line) == ("invalid_json_line", 2)


def test_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_LINE_BYTES", 200)
    (error,) = refused(tmp_path, f"{line('a')}\n{line('b' * 1000)}\n{line('c')}\n")
    assert (error.code, error.line) == ("line_too_long", 2)


def test_a_line_that_has_too_much_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []
    loads = json.loads

    def noted(text: bytes) -> Any:
        read.append(text)
        return loads(text)

    monkeypatch.setattr("hycluster.batch_api.requests.json.loads", noted)
    text = "\n".join(line(f"c{n}", body=body) for n, body in enumerate([{}, {"x": [{}] * 100}, {"stop": ["{"] * 200}]))
    (error,) = refused(tmp_path, text, max_members=100)
    assert (error.code, error.line) == ("too_many_members", 2)
    assert "has more than 100 members" in error.message
    assert len(read) == 2


@pytest.mark.parametrize("text", ["", "\n \n\n"])
def test_no_requests_at_all(tmp_path: Path, text: str) -> None:
    assert [error.code for error in refused(tmp_path, text)] == ["empty_file"]


def test_too_many_requests(tmp_path: Path) -> None:
    assert run(tmp_path, jsonl(10), max_lines=10).lines == 10
    (error,) = refused(tmp_path, jsonl(11), max_lines=10)
    assert error.code == "too_many_requests"
    assert "10" in error.message


def test_a_file_wrong_in_every_line_is_told_from_its_first_ones(tmp_path: Path) -> None:
    errors = refused(tmp_path, "no\n" * 1000, max_lines=1000)
    assert [error.line for error in errors] == list(range(1, requests.MAX_ERRORS + 1))
