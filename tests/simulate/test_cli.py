"""``hycluster simulate`` as a process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hycluster.cli import app
from hycluster.errors import SettingsError
from tests.command import HEAVY, run, run_anew
from tests.vllm_forks import VllmForks

SETTINGS = {
    "models": [
        {
            "name": "m",
            "source": "nowhere",
            "simulated": {"step_base_s": 0.02, "max_model_len": 4096, "kv_blocks": 4096},
            "replicas": {"min": 2},
        }
    ]
}


# vLLM's import, beside whatever else the machine does, and the simulation.
VLLM_S = 240


@pytest.fixture
def settings(tmp_path: Path) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps(SETTINGS))
    return str(path)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 200 * at, "input_length": 1200, "output_length": 20, "hash_ids": [at % 3, 100 + at, 200 + at]}
        for at in range(60)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.slow
def test_a_trace_beside_a_job_as_json(vllm_forks: VllmForks, tmp_path: Path, settings: str, trace: str) -> None:
    said = vllm_forks.run(
        "hycluster",
        "simulate",
        settings,
        "--trace",
        trace,
        "--bulk",
        "200:30",
        "--seed",
        "3",
        "--json",
        environment={"HYCLUSTER_HOME": str(tmp_path)},
        timeout_s=VLLM_S,
    )
    found: dict[str, Any] = json.loads(said)
    assert (found["requests"], found["failed"], found["prompt_tokens"]) == (60, 0, 72000)
    assert found["bounds"]["unlimited_hit_tokens"] == 57 * 512
    assert 0 < found["prefix_hit_tokens"] <= 57 * 512
    for kind in ("ttft_s", "tpot_s"):
        assert found[kind].keys() == {"mean", "p50", "p90", "p99"}
        assert 0 < found[kind]["p50"] <= found[kind]["p90"] <= found[kind]["p99"]
    assert found["load_p99_over_mean"] >= 1
    assert found["replica_hours"] == pytest.approx(2 * found["duration_s"] / 3600)
    assert (found["gpu_hours"], found["scheduler"], found["policy"]) == (0, "colocation", "predicted_ttft")
    assert 0 < found["online_load"] < 1
    assert found["bulk"]["tokens_per_s"] > 0 < found["left_over_tokens_per_s"]
    assert found["alone"]["ttft_s"]["p99"] > 0


def test_counted_blocks_as_json_and_as_a_page(tmp_path: Path, settings: str, trace: str) -> None:
    """All that is asked for, without vLLM; the same seed gives the same numbers."""
    page = tmp_path / "page.html"
    arguments = ("simulate", settings, "--trace", trace, "--replicas", "3", "--policy", "predicted_ttft", "--scale")
    more = ("1.5", "--seed", "7", "--fidelity", "fast", "--json", "--html", str(page))
    figures = []
    for _ in range(2):
        done, imported = run(*arguments, *more, home=tmp_path, timeout_s=VLLM_S)
        assert (done.returncode, done.stderr) == (0, "")
        assert not HEAVY & imported
        figures.append(json.loads(done.stdout))
    for found in figures:
        assert found.pop("decision_us").keys() == {"p50", "p99"}, "real time, so not the same"
    found, again = figures
    assert found == again
    for kind in ("ttft_s", "tpot_s"):
        assert found[kind].keys() == {"mean", "p50", "p90", "p99"}
    assert found["bounds"].keys() == {"pooled_lru_hit_tokens", "unlimited_hit_tokens"}
    assert 0 < found["prefix_hit_tokens"] <= found["bounds"]["unlimited_hit_tokens"]
    for key in ("requests", "failed", "prompt_tokens", "load_p99_over_mean", "replica_hours", "gpu_hours"):
        assert isinstance(found[key], int | float)
    assert (found["fidelity"], found["policy"], found["failed"]) == ("fast", "predicted_ttft", 0)
    assert "predicted_ttft" in page.read_text()


def test_a_bad_line_of_a_trace_is_named(settings: str, trace: str) -> None:
    with Path(trace).open("a") as file:
        file.write('{"timestamp": 5, "input_length": 0, "output_length": 1, "hash_ids": []}\n')
    arguments = ["simulate", settings, "--trace", trace, "--fidelity", "fast"]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, SettingsError)
    assert error.message.startswith(f"{trace}: line 61: input_length: 0 is not allowed; must be a whole number")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--trace: is missing"),
        (("--trace", "none.csv"), "none.csv: no such file"),
        (("--trace", "TRACE", "--bulk", "12"), "--bulk: '12' is not allowed; must be IN:OUT or IN:OUT:ROWS"),
        (("--trace", "TRACE", "--bulk", "0:3"), "--bulk: '0:3' is not allowed"),
        (("--trace", "TRACE", "--bulk-in-flight", "3"), "--bulk-in-flight: is of the job that --bulk makes"),
        (("--trace", "TRACE", "--load", "0.5", "--scale", "2"), "--load: can't be together with --scale"),
        (("--trace", "TRACE", "--metrics", "http://x"), "--metrics: is where --fit reads"),
        (("--trace", "TRACE", "--scheduler", "best"), "--scheduler: 'best' is not allowed; must be one of colocation"),
        (("--trace", "TRACE", "--policy", "best"), "--policy: 'best' is not allowed; must be one of least_"),
        (("--trace", "TRACE", "--fidelity", "best"), "--fidelity: 'best' is not allowed; must be one of exact, fast"),
        (("--trace", "TRACE", "--fidelity", "fast", "--bulk", "9:9"), "--fidelity: fast can't be together with --bulk"),
        (("--trace", "TRACE", "--fidelity", "fast", "--load", "1"), "--fidelity: fast can't be together with --bulk"),
        (("--html", "x.html", "--fit"), "--html: shows what came of a trace"),
        (("--trace", "TRACE", "--html", "/no/where/x.html"), "--html: /no/where: no such folder"),
        (("--trace", "TRACE", "--set", "router.policy=nearest"), "router.policy: 'nearest' is not allowed"),
        (("--trace", "TRACE", "--model", "x"), "model: 'x' is not in the settings"),
        (("--trace", "TRACE", "--gpu", "H2O"), "--gpu: 'H2O' is not known (did you mean H20?)"),
        (("--trace", "TRACE", "--gpu", "H20"), "nowhere: no such file; must be a model's config.json"),
        (("--trace", "TRACE", "--set", "models.0.simulated=null"), "models: m: nothing says how long a step takes"),
        (("--trace", "TRACE", "--set", "models.0.parallel.data=2"), "models: m: parallel.data: 2 can't be simulated"),
    ],
)
def test_refuses_in_one_line(settings: str, trace: str, arguments: tuple[str, ...], says: str) -> None:
    given = [trace if each == "TRACE" else each for each in arguments]
    error = CliRunner().invoke(app, ["simulate", settings, *given]).exception
    assert isinstance(error, SettingsError)
    assert says in error.message
    assert len(error.message.splitlines()) == 1


def test_refuses_before_anything_heavy(tmp_path: Path, settings: str, trace: str) -> None:
    done, imported = run_anew(
        "simulate", settings, "--trace", trace, "--gpu", "H20", "--bulk", "9:9", home=tmp_path, timeout_s=VLLM_S
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nowhere: no such file; must be a model's config.json, or the folder that has it\n"
    assert not HEAVY & imported
