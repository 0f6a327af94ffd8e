from __future__ import annotations

from pathlib import Path

from hycluster.settings.reference import reference_page
from hycluster.settings.schema import all_kinds
from hycluster.settings.settings import Settings

ROOT = Path(__file__).parents[2]


def test_the_page_is_as_the_code_is() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == reference_page()


def test_every_key_is_there() -> None:
    page = reference_page()
    for kind in all_kinds(Settings):
        section = page.partition(f"## {kind.__name__}\n")[2].partition("\n## ")[0]
        assert all(f"| `{key}` |" in section for key in kind.model_fields), kind.__name__
