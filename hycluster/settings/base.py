"""What all settings share: frozen, unknown keys refused; names, ports, and where state lives."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import stat
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Port = Annotated[int, Field(ge=0, le=65535)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$"
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=NAME_PATTERN)]
# As Kubernetes has them.
LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
LabelKey = Annotated[str, Field(pattern=LABEL_KEY)]
LabelValue = Annotated[str, Field(pattern=LABEL_VALUE)]


def home() -> Path:
    """Where prepared models and state live: ``$HYCLUSTER_HOME``, by default ``~/.cache/hycluster``."""
    return Path(os.environ.get("HYCLUSTER_HOME") or Path.home() / ".cache" / "hycluster").expanduser()


def private_home() -> Path:
    """:func:`home`, made if it is not there: for nobody but its user. Prompts and answers lie in it."""
    folder = home()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    keep_private(folder)
    return folder


def keep_private(path: Path) -> None:
    """Take away what others may do with it, if it is this user's."""
    found = path.stat()
    if found.st_uid == os.getuid() and found.st_mode & 0o077:
        # A volume may not have it; then whoever mounts it says who may.
        with contextlib.suppress(OSError):
            path.chmod(stat.S_IMODE(found.st_mode) & ~0o077)


def is_loopback(host: str) -> bool:
    """Whether no other machine reaches what listens there; False for a name that may be any."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class Strict(BaseModel):
    """Base of all settings: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
