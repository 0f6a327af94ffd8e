from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from hycluster.batch.job import Job
from hycluster.settings.schema import settings_schema

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted((ROOT / "deployments").glob("*.yaml")), ids=lambda file: file.stem)
def test_what_is_in_deployments_holds(file: Path) -> None:
    jsonschema.validate(yaml.safe_load(file.read_text()), settings_schema())


@pytest.mark.parametrize(
    ("change", "told"),
    [({"modles": []}, "modles"), ({"http": {"port": 70000}}, "70000"), ({"router": {"policy": "best"}}, "best")],
)
def test_what_settings_refuse_it_refuses(change: dict[str, object], told: str) -> None:
    settings = {"models": [{"name": "m", "source": "s"}], **change}
    with pytest.raises(jsonschema.ValidationError, match=told):
        jsonschema.validate(settings, settings_schema())


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(settings_schema())
    json.dumps(settings_schema())


@pytest.mark.parametrize("file", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda file: file.stem)
def test_what_is_in_jobs_holds(file: Path) -> None:
    job = yaml.safe_load(file.read_text())
    # The command line has them.
    job["input"] = job.get("input", {}) | {"path": "corpus"}
    job["output"] = {"path": "out"}
    jsonschema.validate(job, settings_schema(Job))
    with pytest.raises(jsonschema.ValidationError, match="tempreature"):
        jsonschema.validate(job | {"sampling": {"tempreature": 0}}, settings_schema(Job))
