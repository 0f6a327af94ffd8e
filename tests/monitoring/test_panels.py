from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hycluster.cli import app
from hycluster.monitoring.files import FOLDER, monitoring_files
from hycluster.monitoring.panels import DASHBOARDS, Query
from hycluster.observe.catalogue import CATALOGUE, names_in
from hycluster.settings.objectives import Objectives

ROOT = Path(__file__).parents[2]
QUERIES = [
    pytest.param(query, id=f"{board.name}-{panel.title}-{number}")
    for board in DASHBOARDS
    for panel in board.panels
    for number, query in enumerate(panel.queries)
]


def test_the_files_are_as_the_code_is() -> None:
    """``hycluster metrics render`` writes them."""
    files = monitoring_files(Objectives())
    for path, text in files.items():
        assert (ROOT / path).read_text() == text, path
    assert {path.relative_to(ROOT) for path in (ROOT / FOLDER).glob("*/*.json")} == {
        path for path in files if path.suffix == ".json"
    }
    kustomization = (ROOT / FOLDER / "kustomization.yaml").read_text()
    assert all(str(path.relative_to(FOLDER)) in kustomization for path in files)


def test_rendering_says_what_has_drifted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["metrics", "render", *arguments])
        return done.exit_code, done.output

    assert run("--check")[0] == 1
    assert not FOLDER.exists()
    assert run()[0] == 0
    (FOLDER / "dashboards/old.json").write_text("{}")
    (FOLDER / "dashboards/pool.json").write_text("{}")
    code, said = run("--check")
    assert (code, said.count("\n")) == (1, 2)
    assert run()[0] == 0
    assert run("--check") == (0, "all as the code says\n")


@pytest.mark.parametrize("query", QUERIES)
def test_queries_are_of_metrics_that_there_are(query: Query) -> None:
    asked = {
        name.removesuffix("_bucket") if name.endswith("_bucket") else name
        for name in names_in(query.promql)
        if not name.startswith("vllm:")
    }
    assert asked <= set(CATALOGUE)
    # A counter is asked for its rate, a gauge is not.
    for name in asked:
        assert (CATALOGUE[name].kind in ("counter", "histogram")) == (f"rate({name}" in query.promql
            or f"increase({name}" in query.promql)  # fmt: skip


def test_each_metric_of_ours_is_to_be_seen() -> None:
    """In a panel, or it is said why not."""
    shown = {name.removesuffix("_bucket") for board in DASHBOARDS for panel in board.panels for query in panel.queries
             for name in names_in(query.promql)}  # fmt: skip
    # By route, duration and size are for whoever looks into one; shares are shown where counts would be.
    elsewhere = {name for name in CATALOGUE if name.endswith(("_duration_seconds", "_highr_seconds", "_size_bytes"))}
    elsewhere |= {"grpc_server_handling_seconds", "hycluster_expert_moved_tokens_total"}
    assert set(CATALOGUE) - shown == elsewhere


def test_dashboards_are_whole() -> None:
    for path, text in monitoring_files(Objectives()).items():
        if path.suffix != ".json":
            continue
        board = json.loads(text)
        assert board["uid"] == f"hycluster-{path.stem}"
        chosen_by = "tenant" if path.stem == "tenants" else "model"
        assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", chosen_by]
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
        assert len(set(places)) == len(places)
        for panel in board["panels"]:
            assert panel["description"]
            assert all(target["expr"] for target in panel["targets"])
            assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
