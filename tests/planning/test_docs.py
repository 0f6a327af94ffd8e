"""docs/planning.md has the figures of the arithmetic."""

from __future__ import annotations

import re

import pytest

from hycluster.planning.architecture import GIB, parameters
from hycluster.planning.families import FAMILIES
from hycluster.planning.gpus import gpu
from hycluster.planning.layouts import Workload, describe, search
from hycluster.planning.plan import total_weights_bytes
from hycluster.planning.precision import precision_of
from hycluster.planning.shares import kv_bytes_per_token
from tests.planning.configs import ROOT, published, shape
from tests.planning.test_architecture import EMBEDDINGS_ACTIVE

TEXT = (ROOT / "docs" / "planning.md").read_text()
# Cells of every table's rows, by their first cell.
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| ")]


def name_of(title: str) -> str:
    return title.lower().replace("llama 3.1", "llama-3.1").replace("kimi k2", "kimi-k2").replace(" ", "-")


SIZES = [row for row in ROWS if len(row) == 5 and row[0][-1] in "BbeK2e3" and "," in row[1] and row[0] != "model"]
SETUPS = [row for row in ROWS if len(row) == 4 and re.match(r"\d", row[2])]


@pytest.mark.parametrize("row", SIZES, ids=lambda row: row[0])
def test_sizes(row: list[str]) -> None:
    name = name_of(row[0])
    model, counted = shape(name), parameters(shape(name))
    said = row[1].split(",")[0]
    decimals = len(said.partition(".")[2])
    assert float(said) == pytest.approx(counted.total / 1e9, abs=0.6 * 10**-decimals)
    assert row[3].split(", ")[0] == f"{kv_bytes_per_token(model):,}"
    if row[2]:
        tables = EMBEDDINGS_ACTIVE.get(name, 1)
        here = counted.active + (tables - 1) * counted.embedding
        assert float(row[2].split(",")[0]) == pytest.approx(here / 1e9, abs=0.06)


@pytest.mark.parametrize("row", SETUPS, ids=lambda row: f"{row[0]} on {row[1]}")
def test_setups(row: list[str]) -> None:
    title, weights = row[0].split(", ")
    config = published(name_of(title))
    held = {"bfloat16": None, "int8 or FP8": "fp8", "FP8": "fp8", "FP8 and FP8 cache": "fp8", "MXFP4": None}[weights]
    precision = precision_of(config, held, "fp8" if "cache" in weights else None)
    best = search(shape(name_of(title)), precision, gpu(row[1]), Workload(8192, 1)).fits[0]
    gpus, _, layout = row[2].partition(": ")
    assert int(gpus) == best.gpus
    if layout:
        cut, _, room = layout.partition(", room for ")
        assert cut == describe(best.parallel)
        assert not room or int(room.split()[0]) == best.sequences


def test_no_table_was_missed() -> None:
    assert len(SIZES) == 14
    assert len(SETUPS) == 14


def test_the_rest() -> None:
    assert f"of the {len(FAMILIES)} kinds of text models" in TEXT
    for name, said in (("gpt-oss-120b", "60.7"), ("gpt-oss-20b", "12.8")):
        held = total_weights_bytes(parameters(shape(name)), precision_of(published(name))) / GIB
        assert f"{name} {said}" in TEXT
        assert f"{held:.1f}" == said
