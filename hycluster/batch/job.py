"""A batch job's settings: one of ``jobs/*.yaml``, plus what the command line says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hycluster.core import Sampling, StructuredOutput
from hycluster.errors import SettingsError, shown
from hycluster.settings.base import Strict
from hycluster.settings.read import load_yaml, override, validate

Task = Literal["summarize", "rewrite", "outline", "ask", "math", "code", "generate"]
Engine = Literal["shared", "dedicated"]
SampledByRow = Literal[
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed",
]  # fmt: skip
# Which no property of a schema may be called.
OWN_COLUMNS = (
    "row_id", "output", "finish_reason", "prompt_tokens", "completion_tokens", "error_type", "error_message",
    "tool_calls", "reasoning",
)  # fmt: skip


class Columns(Strict):
    """Which input columns hold what.

    Attributes:
        text: string column with the text to work on.
        messages: chat column: ``list<struct<role, content>>``, or the same as a JSON string. ``generate`` only.
        question: string column with each row's own question. ``ask`` only.
        sampling: by a field of ``sampling``, the column that has each row's own value; where that is null, the job's
            counts. Not for ``summarize``.
        traceparent: string column with the W3C trace context that a row's request is a part of, as in the HTTP header
            of that name; null is none. Not for ``summarize``.
    """

    text: str | None = Field(default=None, min_length=1)
    messages: str | None = Field(default=None, min_length=1)
    question: str | None = Field(default=None, min_length=1)
    sampling: dict[SampledByRow, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    traceparent: str | None = Field(default=None, min_length=1)


class Input(Strict):
    """Where the rows come from.

    Attributes:
        path: a Parquet file, a folder, a glob or an ``s3://`` URI. The folder may be a table of Delta Lake or Apache
            Iceberg.
        snapshot: of that table: Delta's version, Iceberg's snapshot id. By default the latest when the job begins; it
            is part of the job, and a table that has moved on is another input.
    """

    path: str = Field(min_length=1)
    snapshot: int | None = Field(default=None, ge=0)
    columns: Columns = Columns()


class JobOutput(Strict):
    """Where the results go.

    Attributes:
        path: a folder or an ``s3://`` URI; it holds one job and nothing else.
        columns_suffix: what the names of the columns that the job adds end with. By default nothing; where the input
            has one of these names ``_2``, or ``_3`` and so on: the output of a job is the input of the next.
        fields: also write each property of ``structured_output.json_schema`` into a column of its own: text, whole
            numbers, numbers and booleans as such, anything else as JSON text. A row whose output is not such an object
            (it was cut off by ``max_tokens``, say) goes to the quarantine.
        reasoning: also write what the model thought into a column ``reasoning``; null where it thought nothing, or has
            no ``api.reasoning_parser``.
    """

    path: str = Field(min_length=1)
    columns_suffix: str | None = Field(default=None, max_length=40, pattern=r"^[A-Za-z0-9_.-]*$")
    fields: bool = False
    reasoning: bool = False


class OutputForm(Strict):
    """What form each output must have. Exactly one is set; bounds are those of online requests.

    Attributes:
        json_schema: a JSON schema.
        schema_file: the same in a file of its own; relative to the job file's folder.
        json_object: any JSON object.
        regex: the whole text matches it.
        choice: the text is one of these.
        grammar: EBNF, as xgrammar or llguidance read it.
    """

    json_schema: dict[str, Any] | None = None
    schema_file: str | None = Field(default=None, min_length=1)
    json_object: bool = False
    regex: str | None = Field(default=None, min_length=1)
    choice: tuple[str, ...] | None = Field(default=None, min_length=1)
    grammar: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _is_one(self) -> OutputForm:
        given = [name for name in type(self).model_fields if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            allowed = ", ".join(type(self).model_fields)
            raise ValueError(f"exactly one of {allowed} must be set; set are {', '.join(given) or 'none'}")
        return self

    def asked(self) -> StructuredOutput:
        """The same as a request has it."""
        return StructuredOutput(**self.model_dump(exclude={"schema_file"}))


class Summary(Strict):
    """How ``task: summarize`` treats texts that are longer than the model's context.

    Attributes:
        part_tokens: most tokens of a part; by default what the context leaves.
        overlap_tokens: most tokens before a part that are told again with it; at most half of a part.
        keep_tree: write a column ``tree``: what was summarized from what, as JSON; null where the text fits.
    """

    part_tokens: int | None = Field(default=None, ge=64)
    overlap_tokens: int = Field(default=0, ge=0)
    keep_tree: bool = False

    @model_validator(mode="after")
    def _overlap_is_less_than_half(self) -> Summary:
        if self.part_tokens is not None and self.overlap_tokens > self.part_tokens // 2:
            raise ValueError(
                f"overlap_tokens: {self.overlap_tokens} is not allowed; must be at most half of part_tokens"
            )
        return self


class Job(Strict):
    """One bulk run over Parquet.

    Attributes:
        name: what the job is called in reports and lists.
        model: name of the model that is asked, or of one of its adapters.
        task: a preset, or ``generate``.
        prompt: ``generate`` only: a template with ``{column}`` placeholders; ``{{`` and ``}}`` are braces.
        constant_prompt: the prompt is meant to name no column, so that every row is asked the same.
        question: ``ask`` only: one question for all rows.
        summary: ``summarize`` only: texts that are longer than the context.
        sampling: how tokens are chosen; no ``logprobs``. With ``n`` above 1 the column ``output`` has the first one,
            and two columns more all of them: ``outputs`` and ``finish_reasons``.
        structured_output: the form that each output must have. Not for ``summarize``.
        tools: functions that the model may call, as in OpenAI's chat API. Its calls are in a column ``tool_calls``, as
            JSON; null where there are none. Not for ``summarize``.
        tool_choice: ``auto``, ``none``, ``required``, or ``{type: function, function: {name: NAME}}``.
        chat_template_kwargs: for the model's chat template, such as ``{enable_thinking: false}``.
        engine: ``shared`` joins the running cluster at low priority; ``dedicated`` starts engines of its own.
        max_quarantined_fraction: fraction of all rows that may be quarantined; above it the job ends with exit code 3.
        shard_rows: most rows of a shard; a shard is committed as one, and generated again as one after a crash.
        rows_in_flight: most rows of the job that the engines hold at any moment; by default as many as
            they can use of what online requests leave, or 256 where they do not say.
        generate_processes: processes that feed the engines; each has a gateway of its own.
        retry_s: seconds for which rows are tried again while no engine answers any of them; then the job fails.
    """

    name: str = Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str = Field(min_length=1)
    task: Task
    prompt: str | None = Field(default=None, min_length=1)
    constant_prompt: bool = False
    question: str | None = Field(default=None, min_length=1)
    input: Input
    output: JobOutput
    summary: Summary | None = None
    sampling: Sampling = Sampling()
    structured_output: OutputForm | None = None
    tools: tuple[dict[str, Any], ...] | None = Field(default=None, min_length=1)
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    engine: Engine = "shared"
    max_quarantined_fraction: float = Field(0.01, ge=0, le=1)
    shard_rows: int = Field(256, ge=1, le=100_000)
    rows_in_flight: int | None = Field(None, ge=1, le=100_000)
    generate_processes: int = Field(1, ge=1, le=256)
    retry_s: float = Field(300, ge=0)

    @model_validator(mode="after")
    def _task_has_what_it_needs(self) -> Job:
        columns = self.input.columns
        if self.task == "generate":
            given = [self.prompt is not None, columns.messages is not None]
            if all(given):
                raise ValueError(
                    "prompt: not allowed beside input.columns.messages; give one of the two (--set prompt=null takes"
                    " away what the file says)"
                )
            if not any(given) and columns.text is None:
                raise ValueError("task: 'generate' needs prompt, input.columns.messages or input.columns.text")
        else:
            for key, value in (("prompt", self.prompt), ("input.columns.messages", columns.messages)):
                if value is not None:
                    raise ValueError(f"{key}: only for task 'generate', not for the preset {self.task!r}")
            if columns.text is None:
                raise ValueError(f"input.columns.text: must be set for task {self.task!r}")
        if self.task == "ask" and (self.question is None) == (columns.question is None):
            raise ValueError("question: task 'ask' needs either question or input.columns.question")
        if self.task != "ask" and (self.question or columns.question):
            raise ValueError(f"question: only for task 'ask', not for {self.task!r}")
        if self.summary is not None and self.task != "summarize":
            raise ValueError(f"summary: only for task 'summarize', not for {self.task!r}")
        self._added_columns_are_known()
        if self.sampling.logprobs is not None:
            raise ValueError("sampling.logprobs: not allowed; a batch job's output has no column for them")
        return self

    def _added_columns_are_known(self) -> None:
        columns = self.input.columns
        several = self.sampling.n > 1
        given = {
            "structured_output": self.structured_output is not None,
            "tools": self.tools is not None,
            "input.columns.sampling": bool(columns.sampling),
            "input.columns.traceparent": columns.traceparent is not None,
            "sampling.n": several,
            "output.reasoning": self.output.reasoning,
        }
        for key, is_given in given.items():
            if is_given and self.task == "summarize":
                raise ValueError(f"{key}: not for task 'summarize', which may ask for an output in several requests")
            if is_given and several and key in ("tools", "output.reasoning"):
                raise ValueError(f"{key}: can't go with sampling.n above 1, which writes texts alone")
        if self.tool_choice is not None and self.tools is None:
            raise ValueError(f"tool_choice: {shown(self.tool_choice)} is not allowed without tools")
        if not self.output.fields:
            return
        form = self.structured_output
        schema = form.json_schema if form is not None else None
        # A file is read before a job is one; see load_job.
        if form is not None and form.schema_file is not None:
            return
        if several:
            raise ValueError("output.fields: can't go with sampling.n above 1")
        properties = (schema or {}).get("properties")
        if not isinstance(properties, dict) or not properties:
            raise ValueError("output.fields: needs a structured_output.json_schema of an object with properties")
        own = sorted(set(properties) & {*OWN_COLUMNS})
        if own:
            raise ValueError(f"output.fields: the schema's property {own[0]!r} is a column of the job's own")


def load_job(
    path: str | Path,
    assignments: Sequence[str] = (),
    *,
    input_path: str | None = None,
    output_path: str | None = None,
    engine: str | None = None,
) -> Job:
    """Read and check a job file; the other arguments replace what it says.

    Raises:
        SettingsError: names the file, the field, the value and what is allowed.
    """
    options = [
        f"{key}={value}"
        for key, value in (("input.path", input_path), ("output.path", output_path), ("engine", engine))
        if value is not None
    ]
    read = load_yaml(path)
    if "models" in read and "task" not in read:
        raise SettingsError(f"{path}: is a deployment's settings, not a batch job; 'hycluster serve {path}' takes it")
    data = override(read, [*assignments, *options], Job)
    for section, option in (("input", "--input"), ("output", "--output")):
        held: Any = data.setdefault(section, {})
        if isinstance(held, dict) and held.get("path") is None:
            raise SettingsError(f"{path}: {section}.path: not set; set it in the job or give {option} PATH")
    _read_schema(data, Path(path))
    return validate(Job, data, str(path))


def _read_schema(data: dict[str, Any], path: Path) -> None:
    """Put the schema in the place of its file's name: the job may run on another machine."""
    form = data.get("structured_output")
    name = form.get("schema_file") if isinstance(form, dict) else None
    if not isinstance(form, dict) or not isinstance(name, str) or len(form) > 1:
        return
    field, file = f"{path}: structured_output.schema_file", path.parent / name
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else f"is not JSON: {error}"
        raise SettingsError(f"{field}: {str(file)!r}: {why}") from None
    if not isinstance(schema, dict):
        raise SettingsError(f"{field}: {str(file)!r}: must hold an object, not {type(schema).__name__}")
    data["structured_output"] = {"json_schema": schema}
