"""The command as a process: what it imports, and how it refuses."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from hycluster import aside, cli
from hycluster.errors import Unauthenticated
from tests.command import HEAVY, run, run_anew
from tests.waiting import PATIENCE_S


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), ["serve", "batch", "--version"]),
        (("serve",), ["CONFIG|MODEL", "--http-port", "--grpc-port", "--set", "--log-level", "--save"]),
        (("batch",), ["run"]),
        (("summarize",), ["FILE", "--address", "--model", "--together"]),
        (("plan",), ["MODEL_CONFIG", "--gpu", "--context-tokens", "--concurrency", "--json", "--write"]),
        (("chaos",), ["--seed", "--faults", "--targets", "--every", "--address", "--yes"]),
        (("upgrade",), ["CONFIG", "--set", "--address", "--yes"]),
        (("batch", "run"), ["JOB", "--input", "--output", "--engine", "--set", "--address", "--yes"]),
        (("batch", "submit"), ["JOB", "--address", "--wait", "--kubernetes", "--dry-run"]),
        (("batch", "status"), ["OUTPUT|JOB_ID", "--address"]),
        (("status",), ["--address"]),
        (("why",), ["REQUEST_ID", "--slowest", "--model", "--address", "--json"]),
        (("settings", "reference"), ["--job"]),
    ],
)
def test_help_imports_nothing_heavy(tmp_path: Path, arguments: tuple[str, ...], says: list[str]) -> None:
    done, imported = run(*arguments, "--help", home=tmp_path)
    assert done.returncode == 0
    assert all(word in done.stdout for word in says)
    assert "hycluster" in imported
    assert not HEAVY & imported


def test_version(tmp_path: Path) -> None:
    done, imported = run_anew("--version", home=tmp_path)
    assert done.stdout.strip() == "0.1.0"
    assert not HEAVY & imported


GOOD = """
models:
  - name: m
    source: /nowhere/at/all
"""


@pytest.mark.parametrize(
    ("settings", "arguments", "says"),
    [
        (GOOD + "nonsense: 1\n", (), "nonsense"),
        (GOOD, ("--set", "http.prot=1"), "http.prot"),
        (GOOD, ("--set", "http.port"), "--set: 'http.port' must be of the form KEY=VALUE"),
        (GOOD, ("--http-port", "70000"), "http.port: 70000"),
        (GOOD, ("--grpc-port", "-1"), "grpc.port: -1"),
        (GOOD, ("--set", "models.0.replicas.min=0"), "replicas.min: 0"),
        (GOOD, ("--log-level", "loud"), "--log-level: 'loud' is not allowed; must be one of debug, info"),
        (GOOD, (), "/nowhere/at/all"),
        ("models: [", (), "is not YAML"),
        ("", (), "is empty"),
        (None, (), "no such file"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_2(
    tmp_path: Path, settings: str | None, arguments: tuple[str, ...], says: str
) -> None:
    path = tmp_path / "settings.yaml"
    if settings is not None:
        path.write_text(settings)
    done, imported = run("serve", str(path), *arguments, home=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("starting ")]
    assert line.startswith("error: ")
    assert says in line
    assert not {"ray", "vllm", "torch"} & imported


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sreve",), "sreve"),
        (("serve", "--http-prot", "1"), "--http-prot"),
        (("serve", "--http-port", "many"), "http.port: 'many' is not allowed"),
        (("batch", "run"), "JOB"),
    ],
)
def test_wrong_use_exits_2_and_names_what(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    done, imported = run(*arguments, home=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not HEAVY & imported


def test_no_ray_at_the_address_is_one_line(tmp_path: Path) -> None:
    # A model that is in order, so that the command gets as far as Ray.
    model = tmp_path / "model"
    model.mkdir()
    for name, content in (("config.json", '{"model_type": "llama"}'), ("tokenizer.json", "{}")):
        (model / name).write_text(content)
    path = tmp_path / "settings.yaml"
    path.write_text(f"models: [{{name: m, source: {model}, simulated: {{}}}}]")
    done, _ = run_anew("serve", str(path), home=tmp_path / "home")
    assert done.returncode == 2
    # What Ray says for itself is set aside from here on.
    log = r"what Ray says for itself: \S+/home/state/logs/ray-\d+\.log"
    said = rf"starting m \.\.\.\n{log}\nerror: RAY_ADDRESS: no Ray cluster at '127\.0\.0\.1:1': .*refused\n"
    assert re.fullmatch(said, done.stderr)


def test_serve_of_a_misspelt_file_tells_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "local.yaml").touch()
    done, imported = run("serve", str(tmp_path / "locl.yaml"), home=tmp_path)
    assert done.returncode == 2
    assert f"locl.yaml: no such file (did you mean '{tmp_path / 'local.yaml'}'?)" in done.stderr
    assert not {"ray", "vllm", "torch"} & imported


@pytest.mark.parametrize(
    ("number", "is_ready", "code", "last"),
    [
        (signal.SIGINT, False, 130, "stopped by Ctrl-C before it was ready"),
        (signal.SIGTERM, False, 0, "stopped"),
        (signal.SIGINT, True, 0, "stopped"),
    ],
)
def test_how_serve_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_ready: bool, code: int, last: str
) -> None:
    """Of a service that is a stand-in; before it was ready Ctrl-C exited 0, as if it had served."""
    import ray

    from hycluster import cluster
    from hycluster.serving import deploy, service

    def start(_settings: object, _service: object, *, stopping: threading.Event, **_: object) -> object:
        if is_ready:
            return SimpleNamespace(ingresses=SimpleNamespace(http="h", grpc="g"), models=["m"])
        os.kill(os.getpid(), number)
        assert stopping.wait(PATIENCE_S)
        return None

    def attend(stopping: threading.Event) -> None:
        os.kill(os.getpid(), number)
        assert stopping.wait(PATIENCE_S)

    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path))
    monkeypatch.setattr(cli, "_check_models", lambda _: None)
    monkeypatch.setattr(cluster, "start", lambda: True)
    monkeypatch.setattr(service, "Service", lambda *_, **__: SimpleNamespace(attend=attend, close=lambda: None))
    monkeypatch.setattr(deploy, "deploy", start)
    monkeypatch.setattr(deploy, "stop", lambda _: None)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="a"))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        done = CliRunner().invoke(cli.app, ["serve", "--http-port", "0", "--grpc-port", "0"])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert done.exit_code == code, done.output
    assert done.stderr.splitlines()[-1] == last


@pytest.mark.parametrize(("key", "given"), [("hyc_x", "set"), (None, "not set")])
def test_who_is_not_let_in_hears_where_a_command_takes_its_key_from(
    key: str | None, given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> None:
        raise Unauthenticated("API key: is missing; give it as 'Authorization: Bearer KEY'")

    monkeypatch.setattr(cli, "app", refused)
    monkeypatch.setattr(aside, "in_a_command", lambda _, quick: None)
    monkeypatch.delenv("HYCLUSTER_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("HYCLUSTER_API_KEY", key)
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert said[0].startswith("error: API key: is missing")
    assert said[1] == f"error: commands give the key that the variable HYCLUSTER_API_KEY holds, which is {given}"
