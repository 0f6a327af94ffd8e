"""What Ray's node runs in the place of a worker: has a fork server make it, or becomes it the usual way.

    python -I -S tests/ray_forks_launcher.py FOLDER PRELOADED SETUP_WORKER ...

Imports as little as it can, as each worker waits for it. See ``ray_forks.py``.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys

# In the environment of what imports vLLM, and in no other's (``hycluster/app.py``, ``hycluster/engine/arguments.py``).
WANTS_VLLM = "VLLM_NO_USAGE_STATS"
_CONTEXT = "--serialized-runtime-env-context="


def main() -> None:
    folder, preloaded, *command = sys.argv[1:]
    try:
        forked = _forked(f"{folder}/forks-{os.environ['RAY_RAYLET_PID']}", preloaded, command)
    except OSError:
        forked = False
    if not forked:
        os.execv(sys.executable, [sys.executable, *command])


def _forked(path: str, preloaded: str, command: list[str]) -> bool:
    contexts = [word.removeprefix(_CONTEXT) for word in command if word.startswith(_CONTEXT)]
    context = json.loads(contexts[0]) if contexts else {}
    variables = context.get("env_vars") or {}
    kind = "vllm" if WANTS_VLLM in variables or (not variables and os.path.exists(f"{path}.imported")) else "plain"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                server.connect(f"{path}.{kind}")
            except (FileNotFoundError, ConnectionRefusedError):
                _start(path, preloaded)
                server.connect(f"{path}.{kind}")
        request = {
            "command": [word for word in command if not word.startswith((_CONTEXT, "--language="))],
            "context": context,
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "nice": os.nice(0),
            "group": 0 if os.getpgrp() == os.getpid() else os.getpgrp(),
        }
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        return server.recv(1) == b"y"


def _start(path: str, preloaded: str) -> None:
    """It has what this process has of Ray's node: limits, signals, niceness."""
    listeners = []
    for kind in ("plain", "vllm"):
        if os.path.exists(f"{path}.{kind}"):
            os.unlink(f"{path}.{kind}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(f"{path}.{kind}")
        listener.listen(64)
        listener.set_inheritable(True)
        listeners.append(listener)
    from_here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ray_forks.py")
    numbers = [str(listener.fileno()) for listener in listeners]
    # Ray writes a process' title over its arguments; these leave room for one.
    arguments = [sys.executable, from_here, *numbers, preloaded, "-" * 1000]
    environment = {**os.environ, "LD_PRELOAD": preloaded}
    environment.update(
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        JE_ARROW_MALLOC_CONF="background_thread:false",
    )
    os.posix_spawn(sys.executable, arguments, environment, setpgroup=0)


if __name__ == "__main__":
    main()
