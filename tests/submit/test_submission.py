from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hycluster.batch.job import Job, load_job
from hycluster.errors import SettingsError
from hycluster.settings.read import load_settings
from hycluster.settings.settings import Settings
from hycluster.submit.submission import MOST_ID_CHARACTERS, new_job_id, submission

# Stands for `hycluster` on the cluster: prints its arguments and what is in the files among them.
SPY = """#!/bin/sh
for argument in "$@"; do
    case $argument in /dev/fd/*) cat "$argument" > "$RECEIVED${argument##*/}";; esac
done
echo "$@"
"""
DEPLOYMENT = Settings.model_validate(
    {
        "models": [{"name": "other", "source": "/o"}, {"name": "m", "source": "/m", "engine": {"max_num_seqs": 8}}],
        "http": {"port": 1234},
        "data_plane": {"host": "127.0.0.1"},
        "start_timeout_s": 7,
    }
)


def make(**changes: Any) -> Job:
    data: dict[str, Any] = {
        "name": "nightly",
        "model": "m",
        "task": "generate",
        "prompt": "Say {text}",
        "input": {"path": "s3://bucket/in"},
        "output": {"path": "s3://bucket/out"},
    }
    return Job.model_validate(data | changes)


def received(job: Job, folder: Path, **arguments: Any) -> tuple[list[str], Job, Settings | None]:
    """What `batch run` is called with on the other side: by the shell that Ray uses, and by our own reader."""
    (folder / "hycluster").write_text(SPY)
    (folder / "hycluster").chmod(0o755)
    sent = submission(job, DEPLOYMENT, **arguments)
    env = {"PATH": f"{folder}:/usr/bin:/bin", "RECEIVED": f"{folder}/"}
    done = subprocess.run(sent.command, shell=True, env=env, capture_output=True, text=True, check=True)
    config = folder / "4" if job.engine == "dedicated" else None
    return done.stdout.split(), load_job(folder / "3"), load_settings(config) if config else None


def test_what_arrives_is_what_was_sent(tmp_path: Path) -> None:
    job = make(sampling={"max_tokens": 8, "temperature": 0, "stop": ["\n", "JOB"]}, shard_rows=3)
    arguments, arrived, config = received(job, tmp_path)
    assert arguments == ["batch", "run", "/dev/fd/3"]
    assert arrived == job
    assert config is None
    # What the job leaves to the defaults is left to those of the cluster.
    assert "retry_s" not in (tmp_path / "3").read_text()
    assert "top_p" not in (tmp_path / "3").read_text()


def test_dedicated_engines_take_their_model_and_no_ingress_processes_along(tmp_path: Path) -> None:
    arguments, arrived, config = received(make(engine="dedicated"), tmp_path, overwrite=True)
    assert arguments == ["batch", "run", "/dev/fd/3", "--config", "/dev/fd/4", "--overwrite", "--yes"]
    assert arrived.engine == "dedicated"
    assert config is not None
    assert config.models == DEPLOYMENT.models[1:]
    assert (config.start_timeout_s, config.http.port, config.data_plane.host) == (7, 8000, None)


@settings(max_examples=25)
@given(st.text(st.characters(codec="utf-8", exclude_characters="{}"), min_size=1, max_size=40))
@example("\x85")
@example("a\u2028b\u2029")
def test_any_prompt_survives_the_shell(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    for prompt in (text, f"JOB\n{text}\nJOB\n$HOME `id` 'x' \"y\" \\\n"):
        job = make(prompt=prompt)
        assert received(job, tmp_path_factory.mktemp("shell"))[1] == job


def test_ids_tell_the_name_and_are_names_for_kubernetes() -> None:
    for name in ("nightly", "2026.Report_v2", "x" * 100, "a" * 39 + "-b", "7", "A.B-"):
        ids = {new_job_id(name) for _ in range(20)}
        assert len(ids) == 20
        for one in ids:
            assert len(one) <= MOST_ID_CHARACTERS
            assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", one)
            assert "--" not in one
    assert new_job_id("2026.Report_v2").startswith("job-2026-report-v2-")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input": {"path": "corpus/"}}, "input.path: 'corpus/' is relative to this folder"),
        ({"output": {"path": "~/out"}}, "output.path: '~/out' is relative"),
        ({"input": {"path": "s3://KEY:SECRET@bucket/in"}}, "input.path: 's3://***@bucket/in' has keys in it"),
        ({"engine": "dedicated", "model": "nope"}, "model: 'nope' is not in the settings"),
        ({"prompt": "x" * 130_000 + "{text}"}, "JOB: job and settings are 130"),
    ],
)
def test_what_makes_no_sense_elsewhere_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(said)) as caught:
        submission(make(**changes), DEPLOYMENT)
    assert "SECRET" not in str(caught.value)


def test_paths_of_the_nodes_and_changed_settings_are_noted() -> None:
    job = make(input={"path": "/data/in"}, output={"path": "file:///data/out"}, engine="dedicated")
    notes = submission(job, DEPLOYMENT).notes
    assert [note.partition(":")[0] for note in notes] == ["input.path", "output.path", "data_plane.host"]
    assert submission(make(), None).notes == ()
