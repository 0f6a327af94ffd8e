"""requirements/licences.md is in step with the locks and with what is installed."""

from __future__ import annotations

from pathlib import Path

import licences
import pytest
from licences import OUTPUT, Row, found, page, rows, written

from tests.k8s.dockerfile import SITE_PACKAGES


def known(text: str) -> dict[tuple[str, str], str]:
    return {(row.name, row.version): row.licence for row in written(text)}


def test_the_list_is_in_step_with_the_locks() -> None:
    # KeyError: a package moved; make licences.
    assert page(rows(known(OUTPUT.read_text()))) == OUTPUT.read_text()


def test_the_list_says_what_the_installed_packages_say() -> None:
    listed = known(OUTPUT.read_text())
    here = {pair: text for pair, text in found([SITE_PACKAGES]).items() if pair in listed}
    assert len(here) > 100
    assert {pair: listed[pair] for pair in here} == here


def test_what_asks_for_more_than_to_be_named_has_a_reason() -> None:
    more = [row for row in written(OUTPUT.read_text()) if row.asks_more]
    assert more
    assert [row.name for row in more if not row.reason] == []


@pytest.mark.parametrize("licence", ["GPL-3.0", "LGPL-2.1-only", "AGPL-3.0", "Other/Proprietary License", "unknown"])
def test_a_new_one_that_asks_for_more_is_refused(licence: str) -> None:
    row = Row("left-pad", "1.0", licence, "cpu")
    assert row.asks_more
    assert row.reason == ""


def test_nothing_is_written_without_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(licences, "OUTPUT", tmp_path / "licences.md")
    (tmp_path / "licences.md").write_text(OUTPUT.read_text())
    monkeypatch.setattr(licences, "REASONS", {})
    monkeypatch.setattr("sys.argv", ["licences.py"])
    assert licences.main() == 1
    assert (tmp_path / "licences.md").read_text() == OUTPUT.read_text()


def test_a_package_that_nobody_knows_is_named() -> None:
    with pytest.raises(KeyError, match="accelerate"):
        rows({})
