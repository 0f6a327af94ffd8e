"""What a job may ask for beside a text a row, and the columns that it is written into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from hycluster.batch.added import added_columns
from hycluster.batch.input.corpus import ROW_ID, SHARD, plan_shards
from hycluster.batch.job import Job, load_job
from hycluster.batch.output.identity import columns_suffix, identity
from hycluster.batch.prompts import prompt_of
from hycluster.batch.refusal import ColumnRefused
from hycluster.core import Generation, GenerationRequest, Output, ToolCall, Usage
from hycluster.errors import InvalidInput, SettingsError
from hycluster.gateway.bulk import BulkLanes
from tests.batch.conftest import MakeJob
from tests.batch.stand_in import StandInGenerator
from tests.batch.test_generate import Run, block
from tests.located import at

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": ["integer", "null"]},
        "size": {"type": "number"},
        "alive": {"type": "boolean"},
        "tags": {"type": "array"},
    },
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
FIELDS: dict[str, Any] = {"structured_output": {"json_schema": SCHEMA}, "fields": True}


class Says:
    """Answers each request with the next of the given outputs.

    Attributes:
        requests: what it was asked, by their ids.
    """

    def __init__(self, *outputs: list[Output]) -> None:
        self.outputs = list(outputs)
        self.requests: dict[str, GenerationRequest] = {}
        self.lanes = BulkLanes()

    lane = StandInGenerator.lane

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        assert request.request_id is not None
        self.requests[request.request_id] = request
        return Generation(request.request_id, request.model, self.outputs.pop(0), Usage(3, 4))


def changes(tmp_path: Path, *, fields: bool = False, reasoning: bool = False, **more: Any) -> dict[str, Any]:
    output = {"path": str(tmp_path / "out"), "fields": fields, "reasoning": reasoning}
    return {"output": output, **more}


async def written(
    make_job: MakeJob, tmp_path: Path, generator: Says, rows: int = 1, **more: Any
) -> tuple[pa.Table | None, list[dict[str, Any]]]:
    """The part of one shard, and its quarantine."""
    run = Run(make_job, generator, tmp_path / "out", **changes(tmp_path, **more))
    records = await run(block([f"row {n}" for n in range(rows)], shard_rows=rows))
    await run.close()
    (record,) = records
    part = pq.read_table(tmp_path / "out" / record["part"]["path"]) if record["part"] else None
    return part, run.rows(records, "quarantine")


class TestFields:
    async def test_each_property_is_a_column(self, make_job: MakeJob, tmp_path: Path) -> None:
        said = {"name": "Ada", "age": 36, "size": 1, "alive": False, "tags": ["a", "é"]}
        generator = Says([Output(0, json.dumps(said), [1], "stop")], [Output(0, '{"name": null}', [1], "stop")])
        part, quarantined = await written(make_job, tmp_path, generator, rows=2, **FIELDS)
        assert part is not None
        assert not quarantined
        types = {name: part.schema.field(name).type for name in SCHEMA["properties"]}
        assert types == {
            "name": pa.string(), "age": pa.int64(), "size": pa.float64(), "alive": pa.bool_(), "tags": pa.string(),
        }  # fmt: skip
        first, second = part.select(list(types)).to_pylist()
        assert first == said | {"tags": '["a", "é"]'}
        assert set(second.values()) == {None}
        assert part.column("output").to_pylist()[0] == json.dumps(said)
        (request, _) = generator.requests.values()
        assert request.structured_output is not None
        assert request.structured_output.json_schema == SCHEMA

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ('{"name": "Ad', "is not JSON"),
            ("[]", "is not an object but list"),
            ('{"age": "old"}', "has a 'age' that is no int64"),
            ('{"age": 99999999999999999999}', "has a 'age' that is no int64"),
        ],
    )
    async def test_what_has_them_not_is_quarantined(
        self, make_job: MakeJob, tmp_path: Path, text: str, why: str
    ) -> None:
        generator = Says([Output(0, text, [1], "length")])
        part, (row,) = await written(make_job, tmp_path, generator, **FIELDS)
        assert part is None
        assert row["error_type"] == "InvalidOutput"
        assert row["error_message"].startswith(f"output: {why}")
        assert row["error_message"].endswith("it ended by 'length'")

    async def test_without_them_the_text_is_all(self, make_job: MakeJob, tmp_path: Path) -> None:
        generator = Says([Output(0, "{", [1], "length")])
        part, _ = await written(make_job, tmp_path, generator, structured_output={"json_schema": SCHEMA})
        assert part is not None
        assert part.schema.names[-4:] == ["output", "finish_reason", "prompt_tokens", "completion_tokens"]


async def test_tool_calls_and_reasoning(make_job: MakeJob, tmp_path: Path) -> None:
    call = ToolCall(0, "c1", "f", '{"a": 1}')
    outputs = [Output(0, "", [1], "tool_calls", reasoning="hm", tool_calls=(call,))], [Output(0, "no", [1], "stop")]
    generator = Says(*outputs)
    asked = {"tools": TOOLS, "tool_choice": "auto", "chat_template_kwargs": {"enable_thinking": True}}
    part, _ = await written(make_job, tmp_path, generator, rows=2, reasoning=True, **asked)
    assert part is not None
    assert part.column("tool_calls").to_pylist() == [
        json.dumps([{"id": "c1", "name": "f", "arguments": '{"a": 1}'}]), None,
    ]  # fmt: skip
    assert part.column("reasoning").to_pylist() == ["hm", None]
    request = next(iter(generator.requests.values()))
    assert (request.tools, request.tool_choice, request.chat_template_kwargs) == (
        TOOLS, "auto", {"enable_thinking": True},
    )  # fmt: skip


async def test_half_a_character_that_a_model_names_ends_no_job(make_job: MakeJob, tmp_path: Path) -> None:
    """JSON can name what UTF-8 has not: ``"\\ud800"``."""
    named, call = r'{"name": "ok", "tags": ["\ud800"]}', ToolCall(0, "c1", "f\ud800", "{}")
    said, _ = await written(make_job, tmp_path / "fields", Says([Output(0, named, [1], "stop")]), **FIELDS)
    called, _ = await written(
        make_job, tmp_path / "tools", Says([Output(0, "", [1], "tool_calls", tool_calls=(call,))]), tools=TOOLS
    )
    assert said is not None
    assert json.loads(said.column("tags")[0].as_py()) == ["\ud800"]
    assert called is not None
    assert json.loads(called.column("tool_calls")[0].as_py())[0]["name"] == "f\ud800"


async def test_half_a_character_in_a_refusal_ends_no_job(make_job: MakeJob, tmp_path: Path) -> None:
    class Echoes(StandInGenerator):
        async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
            raise InvalidInput("messages: no part of type \ud800")

    run = Run(make_job, Echoes(), tmp_path / "out")
    (row,) = run.rows(await run(block(["a"])), "quarantine")
    assert (row["error_type"], row["error_message"]) == ("Refused", r"messages: no part of type \ud800")


async def test_several_outputs_of_a_row(make_job: MakeJob, tmp_path: Path) -> None:
    generator = Says([Output(1, "b", [1], "length"), Output(0, "a", [1], "stop")])
    part, _ = await written(make_job, tmp_path, generator, sampling={"n": 2})
    assert part is not None
    (row,) = part.to_pylist()
    assert (row["output"], row["finish_reason"], row["completion_tokens"]) == ("a", "stop", 4)
    assert (row["outputs"], row["finish_reasons"]) == (["a", "b"], ["stop", "length"])


async def test_each_row_has_its_own_sampling(make_job: MakeJob, tmp_path: Path) -> None:
    generator = Says(*[[Output(0, "x", [1], "stop")] for _ in range(4)])
    columns = {"text": "text", "sampling": {"temperature": "heat", "max_tokens": "most"}}
    corpus = {"input": {"path": str(tmp_path), "columns": columns}}
    run = Run(make_job, generator, tmp_path / "out", sampling={"temperature": 0.5, "seed": 7}, **corpus)
    table = block(["a", "b", "c"], shard_rows=3)
    table = table.append_column("heat", pa.array([0.0, None, -1.0])).append_column("most", pa.array([8.0, None, 1.0]))
    (record,) = await run(table.select(["id", "text", "heat", "most", ROW_ID, SHARD]))
    await run.close()
    a, b = (generator.requests[f"test-f.parquet#{n}"].sampling for n in range(2))
    assert (a.temperature, a.max_tokens, a.seed) == (0.0, 8, 7)
    assert (b.temperature, b.max_tokens, b.seed) == (0.5, None, 7)
    (refused,) = run.rows([record], "quarantine")
    assert refused["error_message"].startswith("sampling.temperature: -1.0 is not allowed")


def test_columns_of_sampling_hold_numbers(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(input={"path": str(tmp_path), "columns": {"text": "text", "sampling": {"seed": "s"}}})
    prompt = prompt_of(job)
    assert prompt.columns == ("text", "s")
    prompt.check(pa.schema({"text": pa.string(), "s": pa.int32()}), "f")
    with pytest.raises(ColumnRefused, match="f: column 's' is string; must be a number"):
        prompt.check(pa.schema({"text": pa.string(), "s": pa.string()}), "f")
    with pytest.raises(ColumnRefused, match="no column 's'"):
        prompt.check(pa.schema({"text": pa.string()}), "f")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"output": {"path": "o", "fields": True}}, "output.fields: needs a structured_output.json_schema"),
        (
            {"output": {"path": "o", "fields": True}, "structured_output": {"regex": "a"}},
            "output.fields: needs a structured_output.json_schema",
        ),
        (
            {
                "output": {"path": "o", "fields": True},
                "structured_output": {"json_schema": {"properties": {"output": {}}}},
            },
            "output.fields: the schema's property 'output' is a column of the job's own",
        ),
        ({"structured_output": {"regex": "a", "json_object": True}}, "exactly one of .* set are json_object, regex"),
        ({"tool_choice": "auto"}, "tool_choice: 'auto' is not allowed without tools"),
        ({"tools": TOOLS, "sampling": {"n": 2}}, r"tools: can't go with sampling\.n above 1"),
        ({"task": "summarize", "sampling": {"n": 2}}, r"sampling\.n: not for task 'summarize'"),
        ({"task": "summarize", "tools": TOOLS}, "tools: not for task 'summarize'"),
        ({"tools": []}, "tools"),
        ({"input": {"path": "i", "columns": {"text": "t", "sampling": {"n": "c"}}}}, "columns.sampling"),
        ({"sampling": {"logprobs": 1}}, "sampling.logprobs: not allowed"),
    ],
)
def test_what_does_not_go_together(make_job: MakeJob, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        make_job(**given)


def test_a_schema_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    path = tmp_path / "job.yaml"
    job = {"name": "n", "model": "m", "task": "generate", "prompt": "{t}", "input": {"path": "i"}}
    job |= {"output": {"path": "o", "fields": True}, "structured_output": {"schema_file": "schema.json"}}
    path.write_text(json.dumps(job))
    read = load_job(path)
    # It travels with the job.
    assert read.model_dump(exclude_unset=True)["structured_output"] == {"json_schema": SCHEMA}
    assert [column.name for column in added_columns(read)] == list(SCHEMA["properties"])
    for content, says in (("[]", "must hold an object, not list"), ("{", "is not JSON")):
        (tmp_path / "schema.json").write_text(content)
        with pytest.raises(SettingsError, match=rf"structured_output\.schema_file: .*schema\.json': {says}"):
            load_job(path)
    with pytest.raises(SettingsError, match=r"nowhere\.json': No such file"):
        load_job(path, ["structured_output.schema_file=nowhere.json"])


def test_outputs_from_before_are_still_known(make_job: MakeJob) -> None:
    def told(job: Job) -> Any:
        return identity(job, plan)["job"]

    job = make_job()
    plan = plan_shards(at(Path(job.input.path)), shard_rows=2, check=prompt_of(job).check)
    known = {"model", "task", "prompt", "question", "summary", "sampling", "shard_rows", "columns", "prompts_version"}
    assert set(told(job)) == known
    assert set(told(job)["columns"]) == {"text", "messages", "question"}
    form = {"structured_output": {"json_schema": SCHEMA}}
    newer = make_job(**form, chat_template_kwargs={"a": 1}, output={"path": "o", "fields": True})
    assert set(told(newer)) - known == {"structured_output", "chat_template_kwargs", "output_fields"}


def test_a_column_of_the_input_keeps_its_name(make_job: MakeJob) -> None:
    schema = {"properties": {"id": {"type": "integer"}}}
    job = make_job(structured_output={"json_schema": schema}, output={"path": "o", "fields": True})
    plan = plan_shards(at(Path(job.input.path)), shard_rows=2, check=prompt_of(job).check)
    assert columns_suffix(job, plan) == "_2"
