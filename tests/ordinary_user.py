"""A command without rights, as in a pod: an ordinary user, no capabilities, the root file system read-only.

For root, whose tests would else find everything allowed. A user namespace makes user 1000 of root, to whom root's files
belong inside; to the kernel that user has no right over anything outside, such as the network. What may be written is
what the pods have volumes for: the temporary folder, shared memory and the home (``k8s/base/rayservice.yaml``).

An ordinary user runs the command as it is, and root without namespaces (most containers) without capabilities alone.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

UID = 1000
_NO_CAPABILITIES = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
_USER = ["unshare", "--user", f"--map-user={UID}", f"--map-group={UID}"]
# Arguments: how many folders may be written, these, how many below them may not, these, the command.
_READ_ONLY = """
set -e
mount --make-rprivate /
folders() {
  count=$1; shift
  for folder in "$@"; do
    [ "$count" -gt 0 ] || break
    count=$((count - 1))
    mount --bind "$folder" "$folder"
    [ -z "$option" ] || mount -o "remount,bind,$option" "$folder"
  done
}
option=""; folders "$@"; shift $(($1 + 1))
option=ro; folders "$@"; shift $(($1 + 1))
mount -o remount,bind,ro /
cd "$PWD"
exec "$@"
"""


def as_ordinary_user(command: Sequence[str], env: dict[str, str] | None = None) -> list[str]:
    """The command that runs ``command`` so; its process has the same id.

    Args:
        env: the environment that it will get beside this process'; ``HOME`` and ``HYCLUSTER_HOME`` may be written.
    """
    if os.getuid() != 0 or not shutil.which("setpriv"):
        return list(command)
    if not _namespaces():
        return [*_NO_CAPABILITIES, *command]
    return [*_read_only(os.environ | (env or {})), *_USER, *_NO_CAPABILITIES, *command]


@functools.cache
def _namespaces() -> bool:
    """Whether this root may make them."""
    if not shutil.which("unshare"):
        return False
    tried = [*_read_only(dict(os.environ)), *_USER, *_NO_CAPABILITIES, "true"]
    return subprocess.run(tried, check=False, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def _read_only(env: dict[str, str]) -> list[str]:
    home = Path(env.get("HOME", "~")).expanduser()
    kept = Path(env.get("HYCLUSTER_HOME") or home / ".cache" / "hycluster")
    kept.mkdir(parents=True, exist_ok=True)
    writable = dict.fromkeys([tempfile.gettempdir(), str(home), str(kept)])
    # Wherever they are: what is installed, and the folder that it is started in.
    code = dict.fromkeys([sys.prefix, sys.base_prefix, str(Path(__file__).parents[1])])
    lists = [str(len(writable)), *writable, str(len(code)), *code]
    return ["unshare", "--mount", "sh", "-c", _READ_ONLY, "sh", *lists]
