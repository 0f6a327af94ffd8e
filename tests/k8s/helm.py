"""What ``helm template`` makes of the chart: by Helm's own engine as a library, or by the command where that is not."""

from __future__ import annotations

import platform
import shutil
import subprocess
from functools import cache
from typing import Any

import pytest
import yaml

from tests.k8s.kustomize import K8S

CHART = K8S / "chart"
RELEASE, NAMESPACE = "hycluster", "hycluster"
Resource = dict[str, Any]


class Refused(Exception):
    """Helm renders nothing of these values."""


def template(values: dict[str, Any]) -> list[Resource]:
    """The manifests of a release.

    Raises:
        Refused: with Helm's words.
    """
    text = _by_library(values) if _library() else _by_command(values)
    return [resource for resource in yaml.load_all(text, yaml.CSafeLoader) if resource]


def notes(values: dict[str, Any]) -> str:
    """What Helm prints in the end; only the library can tell."""
    if not _library():
        pytest.skip("helm template prints no notes")
    return str(_rendered(values)[f"{RELEASE}/templates/NOTES.txt"])


def lint(values: dict[str, Any]) -> list[str]:
    """What is wrong beyond advice."""
    if not _library():
        said = _command("lint", str(CHART), "--strict", "--namespace", NAMESPACE, values=values)
        return [line for line in said.splitlines() if line.startswith(("[WARNING]", "[ERROR]"))]
    from helm_python import chart

    report = chart.lint(CHART, values, strict=True, namespace=NAMESPACE)
    return [message["error"] for message in report["messages"] if message["severity"] > 1]


@cache
def _library() -> bool:
    try:
        import helm_python  # noqa: F401
    except ModuleNotFoundError:
        if shutil.which("helm"):
            return False
        if platform.machine() == "x86_64":
            pytest.fail("helm-python-sdk of the extra 'dev' is not installed; run 'make setup'")
        pytest.skip("no helm: its library has no build for this machine, and there is none on the PATH")
    return True


@cache
def _loaded() -> Any:
    from helm_python import Chart

    return Chart.load(CHART)


def _rendered(values: dict[str, Any]) -> dict[str, str]:
    from helm_python import HelmError

    try:
        made: dict[str, str] = _loaded().render(values, name=RELEASE, namespace=NAMESPACE)
    except HelmError as error:
        raise Refused(str(error)) from None
    return made


def _by_library(values: dict[str, Any]) -> str:
    made = _rendered(values).items()
    return "\n".join(f"---\n{text}" for name, text in sorted(made) if name.endswith(".yaml"))


def _by_command(values: dict[str, Any]) -> str:
    return _command("template", RELEASE, str(CHART), "--namespace", NAMESPACE, values=values)


def _command(*arguments: str, values: dict[str, Any]) -> str:
    done = subprocess.run(
        ["helm", *arguments, "--values", "-"],
        input=yaml.safe_dump(values),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise Refused(done.stderr)
    return done.stdout
