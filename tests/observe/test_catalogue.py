from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hycluster.observe.catalogue import CATALOGUE, MetricSpec, metrics_page, names_in

ROOT = Path(__file__).parents[2]
# What vLLM's web framework and gRPC's own libraries call theirs.
FIELDS_OWN = ("http_", "grpc_")


def test_the_page_is_as_the_code_is() -> None:
    """``hycluster metrics reference > docs/metrics.md`` writes it."""
    assert (ROOT / "docs/metrics.md").read_text() == metrics_page()


@pytest.mark.parametrize("family", CATALOGUE.values(), ids=lambda family: family.name)
def test_names_are_as_prometheus_wants_them(family: MetricSpec) -> None:
    assert family.name.startswith(("hycluster_", *FIELDS_OWN))
    assert family.name.endswith("_total") == (family.kind == "counter")
    # Base units, written out, at the end.
    assert not re.search(r"_(ms|s|sec|minutes|hours|kb|kib|mb|mib|gib|percent|perc|share|fraction)(_|$)", family.name)
    if re.search(r"seconds|bytes|ratio", family.name):
        assert re.search(r"_(seconds|bytes|ratio)(_total)?$", family.name)
    assert family.kind != "histogram" or family.name.endswith("_seconds")
    assert len(set(family.labels)) == len(family.labels)
    # Prometheus' own would push ours aside.
    assert not {"instance", "job", "le", "pod"} & set(family.labels)


def test_promtool_finds_nothing_wrong() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool (Debian's package prometheus)")
    lines = []
    for family in CATALOGUE.values():
        # Both from others, whose names they keep.
        if family.name.startswith(FIELDS_OWN):
            continue
        ending = {"histogram": '_bucket{le="+Inf"}', "counter": ""}.get(family.kind, "")
        lines += [
            f"# HELP {family.name} {family.what}",
            f"# TYPE {family.name} {family.kind}",
            f"{family.name}{ending} 1",
        ]
        if family.kind == "histogram":
            lines += [f"{family.name}_sum 1", f"{family.name}_count 1"]
    page = "\n".join([*lines, ""])
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_names_in_a_query() -> None:
    query = 'sum by (le) (rate(vllm:time_to_first_token_seconds_bucket{model="m"}[5m])) / hycluster_replicas_ready'
    assert names_in(query) == {"vllm:time_to_first_token_seconds_bucket", "hycluster_replicas_ready"}


def test_no_metric_is_made_past_the_catalogue() -> None:
    for module in ("colocation", "experts", "failover", "gateways", "ingresses", "scaling"):
        source = Path(importlib.import_module(f"hycluster.observe.{module}").__file__ or "").read_text()
        assert not re.search(r"MetricFamily\(|\"(hycluster|http|grpc)_", source), module
