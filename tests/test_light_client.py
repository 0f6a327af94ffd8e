"""What `pip install hycluster` brings is what the client needs, and no more."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.ingress.stand_in import MODEL, StandInGenerator, open_ingress

ROOT = Path(__file__).parents[1]
DECLARED = {
    canonicalize_name(Requirement(text).name)
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
}

# Lets in nothing but the standard library, this project and the folders and files that it is given.
ALONE = """
import json, sys
from importlib.machinery import PathFinder

class Alone:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in {"hycluster", "google", *ALLOWED}:
            return None
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

ALLOWED = set(json.loads(sys.argv.pop(1)))
BEFORE = set(sys.modules)
sys.meta_path.insert(0, Alone)
"""
CALL = """
from hycluster.client import AsyncClient, Client
from hycluster.errors import UnknownModel
with Client(sys.argv[1]) as client:
    said = client.generate(sys.argv[2], prompt="a", max_tokens=2).outputs[0].text
    streamed = [delta.outputs[0].text for delta in client.stream(sys.argv[2], prompt="a", max_tokens=2)]
    assert client.ready()
    try:
        client.generate("other", prompt="a")
    except UnknownModel as error:
        reason = error.reason
new = [sys.modules[name] for name in list(sys.modules) if name not in BEFORE]
files = [module.__file__ for module in new if getattr(module, "__file__", None)]
print(json.dumps({"said": said, "streamed": streamed, "reason": reason, "files": files}))
"""


def closure(names: Iterable[str]) -> dict[str, Distribution]:
    """The packages and all that they need, as pip installs them."""
    found: dict[str, Distribution] = {}
    left = set(names)
    while left:
        one = distribution(left.pop())
        found[canonicalize_name(one.metadata["Name"])] = one
        wanted = map(Requirement, one.requires or [])
        needed = {each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})}
        left |= {name for name in needed if canonicalize_name(name) not in found}
    return found


def tops(of: dict[str, Distribution]) -> list[str]:
    """The names that they import by."""
    return sorted({file.parts[0].removesuffix(".py") for one in of.values() for file in one.files or []})


async def alone(code: str, *arguments: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", ALONE + code, json.dumps(tops(closure(DECLARED))), *arguments,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_the_client_works_with_its_own_packages_alone_and_uses_each() -> None:
    async with open_ingress(StandInGenerator()) as ingress:
        code, out, err = await alone(CALL, f"127.0.0.1:{ingress.port}", MODEL)
    assert code == 0, err
    told = json.loads(out)
    assert (told["said"], told["streamed"], told["reason"]) == ("w0 w1 ", ["w0 ", "w1 "], "UNKNOWN_MODEL")

    brought = closure(DECLARED)
    owner = {str(one.locate_file(file)): name for name, one in brought.items() for file in one.files or []}
    foreign = {file for file in told["files"] if "site-packages" in file}
    assert {file for file in foreign if file not in owner} == set()
    assert {owner[file] for file in foreign} >= DECLARED


@pytest.mark.parametrize("arguments", [["--help"], ["serve"], []])
async def test_the_command_says_what_to_install(arguments: list[str]) -> None:
    code, out, err = await alone("import runpy; runpy.run_module('hycluster', run_name='__main__')", *arguments)
    assert (code, out) == (2, "")
    assert err == (
        "error: the hycluster command needs more than the client (no 'typer' here): pip install 'hycluster[serve]'\n"
    )


async def test_serving_without_vllm_says_what_to_install() -> None:
    code = """
        import sys, hycluster.__main__, hycluster.cli
        sys.modules["vllm"] = None
        hycluster.cli.main = lambda: __import__("vllm")
        hycluster.__main__.main()
    """
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", "if True:" + code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: this needs vLLM, which is not installed: pip install 'hycluster[cpu]' or 'hycluster[gpu]'\n"
    )


def test_the_command_is_the_one_that_says_so() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"hycluster": "hycluster.__main__:main"}
