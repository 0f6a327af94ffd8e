"""Step times of a real engine: measured in a run of its own, or read from a running service.

    python -m hycluster.simulate.calibrate < model.json

is the run, in a process with the environment of a replica's; ``fit_run`` starts it.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hycluster.engine.step_time import StepTime, StepWork
from hycluster.errors import EngineStartFailed, SettingsError, one_line, shown
from hycluster.observe.colocation import STEP_TERMS
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from hycluster.terminal import echo

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from hycluster.simulate.real_engine import RealEngine

# How long the run may take, once the engine has started.
RUN_S = 60.0
# No step of the run is to be longer than that.
_LONGEST_STEP_S = 2.0
_PASSES = 4
_SAYS = "fitted: "
METRIC = "hycluster_engine_step_coefficient_seconds"
_SAMPLE = re.compile(rf"^{METRIC}{{(?P<labels>[^}}]*)}} (?P<value>\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def fit_run(model: Model) -> Simulated:
    """Start the engine of these settings in a process of its own, run it, and fit its steps.

    Raises:
        SettingsError: the settings are wrong, or the model is simulated already.
        EngineStartFailed: it could not start.
    """
    from hycluster.engine.arguments import engine_environment, model_files

    if model.simulated is not None:
        raise SettingsError(f"models: {model.name}: simulated: has no engine to measure; remove it, or --fit")
    said = json.dumps({"model": model.model_dump(mode="json"), "path": model_files(model)})
    ran = subprocess.run(
        [sys.executable, "-m", "hycluster.simulate.calibrate"],
        input=said, stdout=subprocess.PIPE, text=True, check=False,
        env={**os.environ, **engine_environment(model)},
    )  # fmt: skip
    found = next((line for line in reversed(ran.stdout.splitlines()) if line.startswith(_SAYS)), None)
    if ran.returncode or found is None:
        raise EngineStartFailed(f"models: {model.name}: the engine could not be measured; what it says is above")
    return Simulated.model_validate_json(found.removeprefix(_SAYS))


def fit_metrics(model: Model, url: str) -> Simulated:
    """What the replicas of a running service have learned of their own steps: the mean over them.

    Raises:
        SettingsError: the address does not answer, or knows of none.
    """
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
    except (OSError, ValueError) as error:
        raise SettingsError(f"--metrics: {shown(url)} can't be read: {one_line(error)}") from error
    found: dict[str, list[float]] = {}
    for sample in _SAMPLE.finditer(text):
        labels = dict(_LABEL.findall(sample["labels"]))
        if labels.get("model") == model.name:
            found.setdefault(labels.get("term", ""), []).append(float(sample["value"]))
    if set(found) != set(STEP_TERMS):
        raise SettingsError(
            f"--metrics: {shown(url)} has no {METRIC} of model {model.name!r}; its replicas have not learned yet, or"
            " do not colocate"
        )
    from hycluster.simulate.machine import sizes_of

    return _simulated(tuple(sum(found[term]) / len(found[term]) for term in STEP_TERMS), sizes_of(model))


def coefficients(steps: Sequence[tuple[StepWork, float]], seed: int = 0) -> StepTime:
    """What fits these steps, all of them alike: the schedulers' own fit, which by itself forgets the first ones."""
    fitted, rng = StepTime(), random.Random(seed)
    for _ in range(_PASSES):
        for work, real_s in rng.sample(steps, len(steps)):
            fitted.learn(work, real_s)
    return fitted


def measure(engine: RealEngine, limit_s: float = RUN_S) -> StepTime:
    """Have an engine that does nothing else run steps of many kinds, the small ones first."""
    begun, number = time.monotonic(), 0
    for prompt, rows, tokens in _kinds(engine.config):
        if time.monotonic() - begun > limit_s:
            break
        whole = StepWork(min(prompt * rows, engine.config.scheduler_config.max_num_batched_tokens), rows, prompt * rows)
        if engine.notes.known and engine.notes.predict(whole) > _LONGEST_STEP_S:
            continue
        names = [f"fit-{number + row}" for row in range(rows)]
        for row, name in enumerate(names):
            # Prompts of which none begins as another one does.
            engine.ask(name, [(number + row) * 7919 + position * 31 for position in range(prompt)], tokens)
        engine.wait(*names)
        number += rows
    return coefficients(engine.notes.steps)


def _kinds(config: VllmConfig) -> Iterable[tuple[int, int, int]]:
    """Tokens of a prompt, rows, tokens out; twice, the first time with what is made lazily."""
    most_rows = config.scheduler_config.max_num_seqs
    longest = config.model_config.max_model_len - 16
    rows = [count for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256) if count <= most_rows]
    lengths = [length for length in (8, 24, 48, 96, 192, 384, 768, 1536, 4096) if length <= longest]
    for _ in range(2):
        yield from ((16, count, 10) for count in rows)
        yield from ((length, 1, 4) for length in lengths)
        yield from ((length, count, 6) for length in lengths[3:] for count in rows[3:12:3])


def fitted_settings(fitted: StepTime, sizes: Mapping[str, int]) -> Simulated:
    """``models[].simulated`` that stands for an engine of these sizes."""
    return _simulated(fitted.coefficients_s, sizes)


def _simulated(seconds: Sequence[float], sizes: Mapping[str, Any]) -> Simulated:
    base, prefill, sequence, kv = (float(f"{each:.4g}") for each in seconds)
    return Simulated(step_base_s=base, prefill_token_s=prefill, decode_token_s=sequence, kv_token_s=kv, **sizes)


def main() -> None:
    from hycluster.simulate.real_engine import RealEngine

    said = json.load(sys.stdin)
    model = Model.model_validate(said["model"])
    model = model.model_copy(update={"colocation": model.colocation.model_copy(update={"enabled": True})})
    engine = RealEngine(model, said["path"])
    try:
        fitted = measure(engine)
    finally:
        engine.close()
    echo(f"{len(engine.notes.steps)} steps, mean error {fitted.error:.1%}", err=True)
    echo(_SAYS + fitted_settings(fitted, engine.sizes).model_dump_json())


if __name__ == "__main__":
    main()
