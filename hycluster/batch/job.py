"""A batch job's settings: one of ``jobs/*.yaml``, plus what the command line says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from hycluster.core import Sampling
from hycluster.errors import SettingsError
from hycluster.settings.base import Strict
from hycluster.settings.read import load_yaml, override, validate

Task = Literal["summarize", "rewrite", "outline", "ask", "math", "code", "generate"]
Engine = Literal["shared", "dedicated"]


class Columns(Strict):
    """Which input columns hold what.

    Attributes:
        text: string column with the text to work on.
        messages: chat column: ``list<struct<role, content>>``, or the same as a JSON string. ``generate`` only.
        question: string column with each row's own question. ``ask`` only.
    """

    text: str | None = Field(default=None, min_length=1)
    messages: str | None = Field(default=None, min_length=1)
    question: str | None = Field(default=None, min_length=1)


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
    """

    path: str = Field(min_length=1)
    columns_suffix: str | None = Field(default=None, max_length=40, pattern=r"^[A-Za-z0-9_.-]*$")


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
        sampling: how tokens are chosen; one output for each row (``n`` is 1), no ``logprobs``.
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
                raise ValueError("prompt: not allowed beside input.columns.messages; give one of the two")
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
        if self.sampling.n != 1:
            raise ValueError(f"sampling.n: {self.sampling.n} is not allowed; a batch job writes one output a row")
        if self.sampling.logprobs is not None:
            raise ValueError("sampling.logprobs: not allowed; a batch job's output has no column for them")
        return self


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
    data = override(load_yaml(path), [*assignments, *options], Job)
    for section, option in (("input", "--input"), ("output", "--output")):
        held: Any = data.setdefault(section, {})
        if isinstance(held, dict) and held.get("path") is None:
            raise SettingsError(f"{path}: {section}.path: not set; set it in the job or give {option} PATH")
    return validate(Job, data, str(path))
