"""That tests' services have no rights where they say so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.ordinary_user import UID, _namespaces, as_ordinary_user

LOOK = """
import json, os, re, sys
def writable(path):
    try:
        open(path, "a").close()
    except OSError as error:
        return error.strerror
    return True
status = open("/proc/self/status").read()
print(json.dumps({
    "uid": os.getuid(), "pid": os.getpid(), "folder": os.getcwd(),
    "capabilities": re.findall(r"Cap(?:Eff|Prm|Amb):\\t(\\w+)", status),
    "writable": {path: writable(path) for path in sys.argv[1:]},
}))
"""


@pytest.mark.skipif(not _namespaces() or os.getuid() != 0, reason="only root with namespaces becomes one")
def test_what_such_a_process_may_do(tmp_path: Path) -> None:
    home = tmp_path / "home"
    read_only = ["/etc/some-file", f"{sys.prefix}/some-file", str(Path(__file__).with_name("some-file"))]
    open_to_it = [f"{tempfile.gettempdir()}/hycluster-some-file", "/dev/shm/hycluster-some-file", f"{home}/some-file"]
    command = as_ordinary_user([sys.executable, "-c", LOOK, *read_only, *open_to_it], {"HYCLUSTER_HOME": str(home)})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate(timeout=60)
    for path in open_to_it:
        Path(path).unlink()
    found = json.loads(out)
    assert (found["uid"], found["pid"], found["folder"]) == (UID, process.pid, os.getcwd())
    assert set(found["capabilities"]) == {"0" * 16}
    assert found["writable"] == dict.fromkeys(read_only, "Read-only file system") | dict.fromkeys(open_to_it, True)
