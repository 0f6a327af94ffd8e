from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from hycluster.batch.job import Job
from hycluster.settings.reference import HEAD, JOB_HEAD, reference_page
from hycluster.settings.schema import all_kinds, descriptions, keys
from hycluster.settings.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("page", "kind", "head"), [("settings", Settings, HEAD), ("jobs", Job, JOB_HEAD)])
def test_the_page_is_as_the_code_is(page: str, kind: type[BaseModel], head: str) -> None:
    """``hycluster settings reference [--job] > docs/PAGE.md`` writes it."""
    assert (ROOT / f"docs/{page}.md").read_text() == reference_page(kind, head)


@pytest.mark.parametrize("kind", [Settings, Job])
def test_every_key_is_there_and_says_what_it_is(kind: type[BaseModel]) -> None:
    page = reference_page(kind)
    for each in all_kinds(kind):
        section = page.partition(f"## {each.__name__}\n")[2].partition("\n## ")[0]
        assert all(f"| `{key}` |" in section for key in keys(each)), each.__name__
        assert set(descriptions(each)) == set(keys(each)), each.__name__


def test_values_are_those_of_yaml() -> None:
    for page in (reference_page(), reference_page(Job, JOB_HEAD)):
        assert not {"None", "True", "False"} & set(page.replace("`", " ").replace(";", " ").split())
