from __future__ import annotations

from pathlib import Path

import pytest

from hycluster.batch.job import load_job
from hycluster.errors import SettingsError
from hycluster.settings.read import load_settings

JOBS = Path(__file__).parents[2] / "jobs"
GOOD = {
    "name": "n",
    "model": "m",
    "task": "summarize",
    "input": "{path: in, columns: {text: t}}",
    "output": "{path: out}",
}


def write_job(folder: Path, **changes: str | None) -> Path:
    lines = [f"{key}: {value}" for key, value in {**GOOD, **changes}.items() if value is not None]
    path = folder / "job.yaml"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_jobs_need_only_input_and_output(path: Path) -> None:
    job = load_job(path, input_path="in", output_path="out")
    assert (job.input.path, job.output.path, job.engine) == ("in", "out", "shared")


def test_a_file_of_the_other_kind_is_told_in_one_line() -> None:
    deployment, job = JOBS.parent / "deployments" / "local.yaml", JOBS / "summarize.yaml"
    with pytest.raises(SettingsError, match=r"^.*local.yaml: is a deployment's settings, not a batch job; .*$"):
        load_job(deployment, input_path="in", output_path="out")
    with pytest.raises(SettingsError, match=r"^.*summarize.yaml: is a batch job, not a deployment's settings; .*$"):
        load_settings(job)


def test_a_near_miss_of_the_files_name_is_told(tmp_path: Path) -> None:
    write_job(tmp_path)
    with pytest.raises(SettingsError, match=r"jbo.yaml: no such file \(did you mean '.*/job.yaml'\?\)$"):
        load_job(tmp_path / "jbo.yaml")


@pytest.mark.parametrize(("section", "option"), [("input", "--input"), ("output", "--output")])
def test_a_path_that_is_nowhere_set_names_the_option(tmp_path: Path, section: str, option: str) -> None:
    with pytest.raises(SettingsError, match=rf"job.yaml: {section}.path: not set; .* {option} PATH"):
        load_job(write_job(tmp_path, **{section: "{columns: {text: t}}" if section == "input" else None}))


def test_options_replace_the_file(tmp_path: Path) -> None:
    job = load_job(
        write_job(tmp_path),
        ["sampling.max_tokens=8"],
        input_path="s3://bucket/a: b",
        output_path="o",
        engine="dedicated",
    )
    assert job.sampling.max_tokens == 8
    assert (job.input.path, job.output.path, job.engine) == ("s3://bucket/a: b", "o", "dedicated")
    assert job.input.columns.text == "t"


@pytest.mark.parametrize(
    "prompt", ["Answer with a C # program: {text}", "two\nlines {text}", "{text}", "Question: {text}", "'{text}' 😀"]
)
def test_a_prompt_is_set_as_it_stands(tmp_path: Path, prompt: str) -> None:
    path = write_job(tmp_path, task="generate", prompt="'{text}'")
    job = load_job(path, [f"prompt={prompt}", "model=1.0", "sampling.stop=['# no']"], input_path="in/😀 # 1")
    assert (job.prompt, job.model, job.input.path, job.sampling.stop) == (prompt, "1.0", "in/😀 # 1", ("# no",))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shards": "3"}, "shards: unknown key.*shard_rows"),
        ({"max_tokens": "3"}, r"max_tokens: unknown key; did you mean 'sampling\.max_tokens'\? "),
        ({"path": "3"}, r"path: unknown key; did you mean 'input\.path' or 'output\.path'\? "),
        ({"task": "sumarize"}, "task: 'sumarize' is not allowed.*'summarize'"),
        ({"engine": "own"}, "engine: 'own' is not allowed.*'dedicated'"),
        ({"sampling": "{max_tokens: 0}"}, "sampling.max_tokens: 0 is not allowed; must be at least 1"),
        ({"sampling": "{n: 2}"}, "sampling.n: not for task 'summarize'"),
        ({"sampling": "{logprobs: 1}"}, "sampling.logprobs: not allowed"),
        ({"max_quarantined_fraction": "1.5"}, "max_quarantined_fraction: 1.5 is not allowed"),
        ({"prompt": "x"}, "prompt: only for task 'generate', not for the preset 'summarize'"),
        ({"task": "generate", "input": "{path: in}"}, "'generate' needs prompt, input.columns.messages or"),
        (
            {"task": "generate", "prompt": "x", "input": "{path: in, columns: {messages: m}}"},
            "prompt: not allowed beside input.columns.messages; give one of the two .--set prompt=null",
        ),
        ({"input": "{path: in}"}, "input.columns.text: must be set for task 'summarize'"),
        ({"task": "ask"}, "question: task 'ask' needs either question or input.columns.question"),
        ({"question": "why?"}, "question: only for task 'ask'"),
        ({"input": "in"}, "input: 'in' is not allowed"),
        ({"task": "rewrite", "summary": "{}"}, "summary: only for task 'summarize', not for 'rewrite'"),
        ({"summary": "{part_tokens: 63}"}, "summary.part_tokens: 63 is not allowed: .*greater than or equal to 64"),
        (
            {"summary": "{part_tokens: 100, overlap_tokens: 51}"},
            "summary.*overlap_tokens: 51 is not allowed; must be at most half of part_tokens",
        ),
    ],
)
def test_wrong_settings_name_field_value_and_what_is_allowed(
    tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    with pytest.raises(SettingsError, match=f"job.yaml: .*{said}") as refused:
        load_job(write_job(tmp_path, **changes))
    assert "\n" not in refused.value.message
