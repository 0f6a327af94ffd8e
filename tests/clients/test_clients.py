"""The clients that people have, each in its own environment against the same ingress; docs/clients.md shows them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.answering import MODEL, answer_to, answering_ingress, example

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PAGE = ROOT / "docs/clients.md"
# Made by scripts/clients.sh.
PYTHON = ROOT / ".venv-clients/bin/python"
NODE = ROOT / ".venv-clients/node"
MISSING = "its packages are not there: make clients"

# As people write it; where the ingress of a test is takes its place.
ADDRESS = "http://127.0.0.1:8000"
# What follows is of the test alone.
END = re.compile(r"\n(?:#|//) Of the page, only what is above\.\n")
SCRIPTS = sorted([*HERE.glob("python/*.py"), *HERE.glob("node/*.mjs")])
# They are among what this environment has, in a newer version.
OURS = ("openai.py", "anthropic.py")
SETTINGS = {
    # Nothing is fetched from elsewhere: prices of models, and where tokenizers come from.
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_PROXY": "127.0.0.1",
    "NO_COLOR": "1",
}


@pytest.fixture(scope="module")
def ingress(vllm_imported: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with answering_ingress(tmp_path_factory.mktemp("answering")) as url:
        yield url


def command(script: Path) -> tuple[list[str], Path]:
    """What runs a script that it reads from standard input, and where; or the test is skipped."""
    if script.suffix == ".mjs":
        node = shutil.which("node")
        if node is None or not (NODE / ".stamp").exists():
            pytest.skip(MISSING)
        return [node, "--input-type=module"], NODE
    # Not beside the scripts, which have the names of what they import.
    if script.name in OURS:
        return [sys.executable, "-"], ROOT
    if not PYTHON.parents[1].joinpath(".stamp").exists():
        pytest.skip(MISSING)
    return [str(PYTHON), "-"], ROOT


@pytest.mark.slow
@pytest.mark.timeout(180)
# Of vLLM, which tells its own fields that they are old.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_what_a_client_relies_on(script: Path, ingress: str) -> None:
    words, folder = command(script)
    source = script.read_text()
    assert ADDRESS in source
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "ANTHROPIC_"))}
    done = subprocess.run(
        words,
        input=source.replace(ADDRESS, ingress),
        cwd=folder,
        env=kept | SETTINGS,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_page_shows_what_is_tested() -> None:
    shown = dict(re.findall(r"`(tests/clients/[\w/.]+)`\)?:\n\n```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL))
    tested = {str(script.relative_to(ROOT)): END.split(script.read_text())[0] for script in SCRIPTS}
    assert tested == shown
    assert len(tested) == len([script for script in SCRIPTS if END.search(script.read_text())])


def test_what_the_stand_in_says() -> None:
    tool: dict[str, Any] = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
    }
    asked = '{"role": "user", "content": "x"}\n'
    tools = f'[{{"function": {{"name": "f", "parameters": {tool["function"]["parameters"]}}}}}]\n'.replace("'", '"')
    assert answer_to(f"{asked}assistant:", {}) == "Message 1, of the user: x"
    assert answer_to(f"{tools}{asked}assistant:", {}) == '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert answer_to(f"{asked}assistant:", {"json": {"type": "integer"}}) == "36"
    several = {"$defs": {"A": {"enum": ["b"]}}, "type": "array", "items": {"anyOf": [{"$ref": "#/$defs/A"}]}}
    assert example(several) == ["b"]
    assert MODEL in SCRIPTS[0].read_text()
