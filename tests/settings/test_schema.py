from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from hycluster.settings.schema import all_kinds, descriptions, settings_schema
from hycluster.settings.settings import Settings

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


def test_no_docstring_describes_a_key_that_is_not_there() -> None:
    for kind in all_kinds(Settings):
        assert set(descriptions(kind)) <= set(kind.model_fields), kind.__name__
