"""Follows the Dockerfile's Python steps in a folder, without a container runtime.

The steps are read from the Dockerfile itself, so that they can't drift. What differs from a build: a path such as
/opt/... lies in the folder, Debian's packages are those of this machine, and installing from a lock is a dry run
against this environment (dry_install.py), after which the locked packages, and no others, are linked in.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SITE_PACKAGES = Path(sys.prefix, "lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
# Not resolved: the link in .venv is what makes it this environment's.
PYTHON = Path(sys.prefix, "bin", "python")

# Making an environment, and the wheel, are real; see dry_install.py.
_UV = """#!/bin/sh
case "$1 $2" in
  "pip install") exec {python} {dry} uv "$@" ;;
  *) exec {uv} "$@" ;;
esac
"""
_PIP = """#!/bin/sh
exec {python} {dry} pip "$@"
"""


class BuildError(Exception):
    """A step of the Dockerfile failed."""


@dataclass
class Stage:
    """What stands between two FROMs."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def stages(text: str) -> list[Stage]:
    """The Dockerfile's stages, each instruction on one line."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found: list[Stage] = []
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found.append(Stage(name, base))
        elif found:
            found[-1].steps.append((word, rest))
    return found


def sent(path: str, ignored: str) -> bool:
    """Whether .dockerignore lets a path, or something in it, into the build; its last word counts."""
    verdict = True
    for line in ignored.splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        names = [path, *(parent.as_posix() for parent in Path(path).parents)]
        inner = line.startswith("!") and Path(pattern).parent.as_posix() == path
        if inner or any(fnmatch(name, pattern) for name in names):
            verdict = line.startswith("!")
    return verdict


@dataclass
class Build:
    """One build: where its files are, and what its environment is."""

    root: Path
    context: Path = ROOT
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    )
    folder: Path = Path("/")

    def inside(self, text: str) -> str:
        """The text with its absolute paths in the build's folder."""
        return re.sub(r"(?<![\w./}])/(?=(opt|srv)\b)", f"{self.root}/", text)

    def follow(self, text: str) -> None:
        """Do every step but Debian's.

        Raises:
            BuildError: a step failed; says which.
        """
        tools = self.root / "tools"
        for name, script in (("uv", _UV), ("pip", _PIP)):
            tools.mkdir(parents=True, exist_ok=True)
            uv = shutil.which("uv", path=PYTHON.parent)
            (tools / name).write_text(
                script.format(python=PYTHON, uv=uv, dry=Path(__file__).with_name("dry_install.py"))
            )
            (tools / name).chmod(0o755)
        path = self.environment["PATH"]
        for stage in stages(text):
            if stage.name == "packages":
                self.environment["PATH"] = f"{tools}:{PYTHON.parent}:{path}"
            elif stage.name == "project":
                _link_packages(self.root / "opt" / "hycluster")
                self.environment["PATH"] = f"{PYTHON.parent}:{path}"
            else:
                self.environment = {"PATH": path}
            for word, rest in stage.steps:
                self._step(word, rest)

    def _step(self, word: str, rest: str) -> None:
        if word in ("ENV", "ARG", "LABEL"):
            if word != "LABEL":
                for key, value in re.findall(r"(\w+)=(\S+)", rest):
                    self.environment[key] = re.sub(
                        r"\$(\w+)", lambda name: self.environment[name[1]], self.inside(value)
                    )
        elif word == "WORKDIR":
            self.folder = Path(self.inside(rest))
            self.folder.mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            self._copy(rest)
        elif word == "RUN" and not rest.startswith("apt-get"):
            done = subprocess.run(
                ["sh", "-c", self.inside(rest)], cwd=self.folder, env=self.environment, capture_output=True, text=True,
                timeout=240, check=False,
            )  # fmt: skip
            if done.returncode:
                raise BuildError(f"{rest}: exit {done.returncode}: {done.stdout}{done.stderr}")

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        if sources[0].startswith("--from="):
            made, into = Path(self.inside(sources[1])), Path(self.inside(target))
            if made != into:
                shutil.copytree(made, into, symlinks=True, dirs_exist_ok=True)
            return
        ignored = (self.context / ".dockerignore").read_text()
        for source in sources:
            if not sent(source, ignored) or not (self.context / source).exists():
                raise BuildError(f"COPY {rest}: {source} is not in what .dockerignore lets through")
            copied = self.folder / target if len(sources) == 1 and target != "./" else self.folder / Path(source).name
            if not (self.context / source).is_dir():
                # With its time, as builders do: setuptools goes by it.
                shutil.copy2(self.context / source, copied)
                continue
            for file in (self.context / source).rglob("*"):
                name = file.relative_to(self.context).as_posix()
                if file.is_file() and "__pycache__" not in name and sent(name, ignored):
                    (copied / file.relative_to(self.context / source)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(file, copied / file.relative_to(self.context / source))


def locked(lock: Path) -> dict[str, Requirement]:
    """What a lock asks for on this machine."""
    wanted = [Requirement(text) for text in re.findall(r"^[a-z0-9][^\\\n]*==[^\\\n]*", lock.read_text(), re.MULTILINE)]
    return {wish.name: wish for wish in wanted if wish.marker is None or wish.marker.evaluate()}


def _link_packages(venv: Path) -> None:
    """What cpu.lock names, and torch, from this environment into another. Folders that several share are made anew."""
    (into,) = venv.glob("lib/python*/site-packages")
    for path in _locked_paths():
        if not (into / path).exists():
            (into / path).parent.mkdir(parents=True, exist_ok=True)
            (into / path).symlink_to(SITE_PACKAGES / path)


@cache
def _locked_paths() -> list[Path]:
    """Folders of one package, and files of those that several share."""
    wanted = {"torch", *locked(ROOT / "requirements" / "cpu.lock")}
    owners = defaultdict(set)
    found = {canonicalize_name(one.name): one for one in distributions(path=[str(SITE_PACKAGES)])}
    for name, one in found.items():
        for file in one.files or []:
            owners[file.parts[0]].add(name)
    paths = {
        Path(*file.parts[:1]) if len(owners[file.parts[0]]) == 1 else Path(file): None
        for wish in sorted(wanted)
        for file in found[canonicalize_name(wish)].files or []
        if file.parts[0] != ".."
    }
    return list(paths)
