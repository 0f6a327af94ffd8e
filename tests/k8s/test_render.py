"""The manifests say what ``deployments/`` says; ``hycluster k8s render`` keeps it so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hycluster.cli import app
from hycluster.errors import SettingsError
from hycluster.k8s.render import (
    APP_NAME,
    IMPORT_PATH,
    for_pods,
    manifest_in,
    manifests,
    render_manifests,
    serve_config,
    settings_of,
    unlisted,
)
from hycluster.settings.read import load_yaml, validate
from hycluster.settings.settings import Settings
from tests.k8s.kustomize import OVERLAYS, ROOT

MODEL = {"name": "m", "source": "org/m"}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the command reads and writes, as the working folder."""
    for folder in ("deployments", "k8s"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["k8s", "render", *arguments])
    return result.exit_code, f"{result.output}{result.exception}"


def test_the_manifests_have_not_drifted() -> None:
    """If this fails, run 'hycluster k8s render'."""
    for manifest in manifests(ROOT):
        for path, text in render_manifests(manifest, settings_of(manifest), ROOT).items():
            assert path.read_text() == text, path


def test_the_application_is_the_one_that_there_is() -> None:
    from hycluster import app as application

    assert (application.APP_NAME, f"{application.__name__}:{application.build.__name__}") == (APP_NAME, IMPORT_PATH)


def test_every_overlay_has_its_settings() -> None:
    assert {manifest_in(overlay) for overlay in OVERLAYS} <= set(manifests(ROOT))
    assert [line for overlay in OVERLAYS for line in unlisted(overlay)] == []


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda overlay: overlay.name)
def test_pods_run_what_the_file_says(overlay: Path) -> None:
    manifest = manifest_in(overlay)
    given = validate(Settings, load_yaml(ROOT / settings_of(manifest)), "file")
    serve = yaml.safe_load(load_yaml(manifest)["spec"]["serveConfigV2"])
    run = validate(Settings, serve["applications"][0]["args"], "manifest")
    assert run.models == given.models
    fitted = {"http", "grpc", "auth", "data_plane", "ingress", "batches"}
    assert run.auth == given.auth.model_copy(update={"open": True})
    assert run.model_dump(exclude=fitted) == given.model_dump(exclude=fitted)


def test_a_store_that_would_be_a_folder_of_the_pods_is_refused() -> None:
    settings = {"models": [MODEL], "batches": {"store": "batches"}}
    with pytest.raises(SettingsError, match=r"batches\.store: 'batches' is below a working folder"):
        serve_config(settings, "file")
    assert serve_config(settings | {"batches": {"store": "/shared"}}, "file")


def test_pods_listen_for_each_other() -> None:
    settings: dict[str, Any] = {
        "models": [MODEL],
        "http": {"host": "127.0.0.1", "port": 0, "max_body_mib": 8},
        "data_plane": {"host": "127.0.0.1", "port_min": 7000, "port_max": 7100},
    }
    fitted = for_pods(settings)
    assert fitted["http"] == {"host": "0.0.0.0", "port": 8000, "max_body_mib": 8}
    assert fitted["grpc"] == {"host": "0.0.0.0", "port": 9000}
    assert fitted["auth"] == {"open": True}
    for auth in ({"enabled": True}, {"enabled": True, "grace_s": 5}, {"open": False}):
        assert for_pods({**settings, "auth": auth})["auth"] == auth
    assert fitted["data_plane"] == {"port_min": 7000, "port_max": 7100}
    assert settings["http"]["port"] == 0, "the settings given were changed"


def test_ingress_processes_are_two_unless_said_otherwise() -> None:
    assert for_pods({"models": [MODEL]})["ingress"]["replicas"] == 2
    assert for_pods({"models": [MODEL], "ingress": {"replicas": 3}})["ingress"]["replicas"] == 3


def test_the_batch_api_needs_a_store_that_all_pods_see() -> None:
    assert for_pods({"models": [MODEL], "batches": {"max_lines": 5}})["batches"] is None
    shared = {"store": "s3://bucket/batches"}
    fitted = for_pods({"models": [MODEL], "batches": shared})["batches"]
    # Its process is on an ingress pod, and keeps none with GPUs.
    assert fitted == shared | {"resources": {"batches": 1}}


def test_models_are_kept_apart_where_they_have_pods_of_their_own(tmp_path: Path) -> None:
    two = {"models": [MODEL, MODEL | {"name": "n", "hardware": {"cpus": 2}}]}
    fitted = for_pods(two)["models"]
    assert [each["hardware"]["resources"] for each in fitted] == [{"engines-m": 0.001}, {"engines-n": 0.001}]
    assert fitted[1]["hardware"]["cpus"] == 2
    assert "resources" not in for_pods({"models": [MODEL]})["models"][0].get("hardware", {})
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two))
    job = tmp_path / "k8s" / "jobs" / "x" / "settings.yaml"
    assert "engines-m" not in render_manifests(job, "two.yaml", tmp_path)[job]


def test_a_folder_of_this_machine_is_no_source() -> None:
    with pytest.raises(SettingsError, match=r"x.yaml: models: m: source: './m' is below a working folder"):
        serve_config({"models": [MODEL | {"source": "./m"}]}, "x.yaml")


def test_a_change_is_seen_and_written(repository: Path) -> None:
    code, said = run("--check")
    assert (code, said.startswith("all as the settings say\n")) == (0, True)
    settings = repository / "deployments" / "local.yaml"
    settings.write_text(settings.read_text() + "drain_timeout_s: 33\n")
    dev = repository / "k8s" / "overlays" / "dev" / "serve-config.yaml"
    before = dev.read_text()
    code, said = run("--check")
    assert (code, dev.read_text()) == (1, before)
    assert said.splitlines()[:3] == [
        "k8s/jobs/summarize/settings.yaml: differs from its settings",
        "k8s/overlays/dev/serve-config.yaml: differs from its settings",
        "k8s/overlays/dev/pods.yaml: differs from its settings",
    ]
    assert run()[0] == 0
    assert "drain_timeout_s: 33" in dev.read_text()
    assert "terminationGracePeriodSeconds\n  value: 83\n" in dev.with_name("pods.yaml").read_text()
    assert run("--check")[0] == 0


def test_a_new_overlay_is_begun(repository: Path) -> None:
    mine = repository / "k8s" / "overlays" / "mine"
    mine.mkdir()
    assert run("deployments/hunyuan-a13b-fp8-2xh20.yaml", "--folder", "k8s/overlays/mine")[0] == 0
    assert settings_of(mine / "serve-config.yaml") == "deployments/hunyuan-a13b-fp8-2xh20.yaml"
    assert mine / "serve-config.yaml" in [manifest.resolve() for manifest in manifests(repository)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["deployments/local.yaml"], "CONFIG: 'deployments/local.yaml' needs --folder"),
        (["--folder", "k8s/overlays/none"], "--folder: 'k8s/overlays/none' is no folder"),
        (["none.yaml", "--folder", "k8s/overlays/dev"], "none.yaml: no such file"),
        (["deployments/hunyuan-tiny.yaml", "--folder", "k8s/overlays/dev"], "'./hunyuan-tiny' is below a working"),
        (["--folder", "k8s/base"], "serve-config.yaml: no such file"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(repository: Path, arguments: list[str], said: str) -> None:
    code, heard = run(*arguments)
    assert code == 1
    assert said in heard


def test_elsewhere_there_is_nothing_to_render(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "run this in the repository" in run()[1]


def test_a_manifest_must_name_its_settings(repository: Path) -> None:
    dev = repository / "k8s" / "overlays" / "dev" / "serve-config.yaml"
    dev.write_text("kind: RayService\nmetadata:\n  name: x\n")
    assert "metadata.annotations: hycluster/settings must name the settings file" in run()[1]


def test_a_kustomization_must_list_what_is_made_for_it(repository: Path) -> None:
    path = repository / "k8s" / "overlays" / "dev" / "kustomization.yaml"
    path.write_text(path.read_text().replace("  - path: pods.yaml\n    target:\n      kind: RayService\n", ""))
    for arguments in ([], ["--check"]):
        code, said = run(*arguments)
        assert code == 1
        assert "k8s/overlays/dev/kustomization.yaml: patches: must list pods.yaml" in said
