"""Stands in for `uv pip install` and `pip install` of a lock: installs nothing, and says what would be other than here.

    python dry_install.py uv|pip ARGUMENTS

The real tool is asked whether it takes the options, with an empty file in each lock's place. The lock's packages must
be those of this environment, exactly, and have a hash where --require-hashes asks for it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

from packaging.requirements import Requirement

ENTRY = re.compile(r"^[a-z0-9][^\n]*(?:\n +--hash=[^\n]*)*", re.MULTILINE)


def faults(lock: Path, hashes: bool) -> list[str]:
    """What is wrong with a lock, or differs from what is installed."""
    found = []
    for entry in ENTRY.findall(lock.read_text()):
        wanted = Requirement(entry.split(" \\")[0])
        if hashes and "--hash=" not in entry:
            found.append(f"{lock.name}: {wanted.name} has no hash")
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            installed = version(wanted.name)
        except PackageNotFoundError:
            installed = "not installed"
        if not wanted.specifier.contains(installed.partition(" ")[0]):
            found.append(f"{lock.name}: {wanted.name}{wanted.specifier}: {installed} here; make setup")
    return found


def main(tool: str, arguments: list[str]) -> int:
    locks = [Path(file) for option, file in pairwise(arguments) if option == "-r"]
    with tempfile.NamedTemporaryFile() as empty:
        tried = [empty.name if Path(word) in locks else word for word in arguments]
        more = ["--dry-run", "--quiet", *(["--offline"] if tool == "uv" else ["--no-index"])]
        asked = subprocess.run([sys.executable, "-m", tool, *tried, *more], check=False)
    wrong = [line for lock in locks for line in faults(lock, "--require-hashes" in arguments)]
    print("\n".join(wrong), file=sys.stderr)
    return asked.returncode or bool(wrong or not locks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
