"""What is installed has all that it asks for, but what requirements/left-out*.txt name with a reason."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = Path(__file__).parents[2] / "requirements"


def test_nothing_is_missing_that_was_not_left_out() -> None:
    left_out = {
        canonicalize_name(line)
        for file in REQUIREMENTS.glob("left-out*.txt")
        for line in file.read_text().splitlines()
        if re.match(r"[a-z]", line)
    }
    found = {canonicalize_name(one.metadata["Name"]): one for one in distributions()}
    locked = {
        canonicalize_name(name)
        for lock in ("cpu.lock", "dev.lock")
        for name in re.findall(r"^([a-z0-9][a-z0-9.-]*)==", (REQUIREMENTS / lock).read_text(), re.MULTILINE)
    }
    missing = {
        f"{name} asks for {requirement.name}"
        for name in locked & found.keys()
        for requirement in map(Requirement, found[name].requires or [])
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if canonicalize_name(requirement.name) not in found.keys() | left_out
    }
    assert missing == set()
