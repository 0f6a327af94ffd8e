"""hycluster's HTTP ingress against vLLM's own API server and Ray Serve LLM: same model, same load, one run.

    make bench          or          python -m bench.gateway --rounds 3 --sides hycluster,vllm,vllm-uni,ray-serve-llm

The model has random weights and next to no size, so the control plane is what is measured. By default each side
is started, warmed up, measured and stopped on its own, round after round; with ``--together`` the sides stay up
and take turns, which on a noisy machine is the fairer way (an idle side costs next to nothing, but for ``vllm``,
which spins). The figures are medians over rounds and the ratios are against ``vllm-uni``, the stronger of the two
ways to run vLLM bare (``vllm`` is how it starts by itself on a CPU: an executor process that waits by spinning).
``hycluster-traces-1`` and ``hycluster-traces-100`` export that per cent of the requests' traces to a collector in this
process, which drops them (``--sides hycluster,hycluster-traces-1,hycluster-traces-100 --together``).
``hycluster-keys`` asks every caller for a key, keeps limits that its callers don't reach and a ledger with prices
(``--sides hycluster,hycluster-keys --together``).
``hycluster-predicted-ttft`` follows its replica's KV blocks, and routes by them
(``--sides hycluster,hycluster-predicted-ttft --together``).
``serve-proxy`` and ``serve-haproxy`` are hycluster's gateway and replicas with Ray Serve's proxy as the front, in
place of an ingress process that listens itself.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bench import tiny_llama
from hycluster.auth.database import bring_up_to_date, open_database
from hycluster.auth.limits import Limit
from hycluster.auth.store import KeyStore
from hycluster.settings.auth import Auth

MODEL = "tiny"
LEVELS = {1: 24, 8: 128, 32: 512}
BASE = "vllm-uni"
# By side, for each round the figures by number of callers.
Rounds = dict[str, list[dict[int, dict[str, Any]]]]
NO_FAILOVER = "hycluster-no-failover"
NOT_ENCRYPTED = "hycluster-not-encrypted"
# By side, the share of the requests whose traces are exported.
TRACED = {"hycluster-traces-1": 0.01, "hycluster-traces-100": 1.0}
KEYS = "hycluster-keys"
# Routes by what replicas have cached, which it has to follow.
BY_BLOCKS = "hycluster-predicted-ttft"
OURS = ("hycluster", NO_FAILOVER, NOT_ENCRYPTED, *TRACED, KEYS, BY_BLOCKS, "serve-proxy", "serve-haproxy")
SIDES = (*OURS, "vllm-uni", "vllm", "ray-serve-llm")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until_served(
    url: str, process: subprocess.Popen[bytes], timeout_s: float = 300, api_key: str | None = None
) -> None:
    """Wait until a completion succeeds."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
    body = json.dumps({"model": MODEL, "prompt": "hello", "max_tokens": 2}).encode()
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        request = urllib.request.Request(f"{url}/v1/completions", data=body, headers=headers)
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(request, timeout=30),
        ):
            return
        time.sleep(0.5)
    raise SystemExit(f"nothing answers at {url} after {timeout_s:.0f} s")


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str], log: Path, tree: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own, ended with the context; of another work tree if one is named."""
    environment = {**os.environ, **env} | ({"PYTHONPATH": tree} if tree else {})
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=tree or None, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@functools.cache
def collector() -> str:
    """Where an OTLP receiver listens that reads what it is sent and keeps nothing."""

    class Sink(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *_: Any) -> None:  # noqa: A002
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def database_url(work: Path) -> str:
    """Where the callers' keys are."""
    return f"sqlite:///{work / 'keys.db'}"


def make_key(work: Path) -> str:
    """A caller's, who has each kind of limit and reaches none."""
    engine = open_database(Auth(enabled=True, database=database_url(work)))
    bring_up_to_date(engine)
    store = KeyStore(engine, "bench")
    _, key = store.create_key(store.create_project("bench", "bench"), "bench")
    many = 10**12
    store.set_limit(Limit("bench", "bench", requests_per_minute=many, tokens_per_minute=many, tokens_per_day=many,
                          concurrent_requests=many, budget_per_month=many))  # fmt: skip
    engine.dispose()
    return str(key)


def side(name: str, model: Path, port: int, work: Path, cpus: float) -> tuple[list[str], dict[str, str]]:
    """Command and environment of one side."""
    kv_bytes = str(1 << 30)
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if name in OURS:
        settings: dict[str, Any] = {
            "router": {"failover": name != NO_FAILOVER} | ({"policy": "predicted_ttft"} if name == BY_BLOCKS else {}),
            # Not where another work tree may not know the key.
            **({"data_plane": {"encrypted": False}} if name == NOT_ENCRYPTED else {}),
            "models": [
                {
                    "name": MODEL,
                    "source": str(model),
                    "engine": {"max_model_len": 2048, "max_num_seqs": 64},
                    "hardware": {"cpus": cpus, "kv_cache_gib": 1},
                }
            ],
        }
        if name in TRACED:
            settings["tracing"] = {"endpoint": collector(), "sample_ratio": TRACED[name]}
        if name == KEYS:
            settings["auth"] = {"enabled": True, "database": database_url(work)}
            settings["ledger"] = {"enabled": True}
            settings["models"][0]["price"] = {"prompt_per_million_tokens": 1, "completion_per_million_tokens": 2.5}
        path = work / f"{name}.json"
        path.write_text(json.dumps(settings))
        if name.startswith("serve-"):
            haproxy = {"RAY_SERVE_ENABLE_HA_PROXY": "1"} if name == "serve-haproxy" else {}
            return [sys.executable, "-m", "bench.serve_front", str(path), str(port)], quiet | haproxy
        command = [sys.executable, "-m", "hycluster", "serve", str(path), "--http-port", str(port), "--grpc-port", "0"]
        return command, quiet
    if name in ("vllm", "vllm-uni"):
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--served-model-name", MODEL, "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32",
            "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "64", "--kv-cache-memory-bytes", kv_bytes,
            "--distributed-executor-backend", "uni", "--disable-uvicorn-access-log",
        ]  # fmt: skip
        own = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        return command, quiet | own | ({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if name == "vllm-uni" else {})
    if name == "ray-serve-llm":
        return [sys.executable, "-m", "bench.ray_serve_llm", str(model), str(port)], quiet
    raise SystemExit(f"--sides: {name!r} is unknown; known are {SIDES}")


@contextlib.contextmanager
def started(name: str, model: Path, work: Path, cpus: float) -> Iterator[Callable[[int, int], dict[str, Any]]]:
    """One side, warm; yields what puts a load on it: callers and requests in, figures out."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    kind, _, tree = name.partition("@")
    command, env = side(kind, model, port, work, cpus)
    api_key = make_key(work) if kind == KEYS else None
    credential = ["--api-key", api_key] if api_key else []

    def load(concurrency: int, requests: int) -> dict[str, Any]:
        out = subprocess.run(
            [sys.executable, "-m", "bench.load", url, MODEL, "--concurrency", str(concurrency),
             "--requests", str(requests), "--pid", str(process.pid), *credential],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        return dict(json.loads(out))

    with running(command, env, work / f"{name.replace('/', '-')}.log", tree) as process:
        wait_until_served(url, process, api_key=api_key)
        load(32, 96)
        load(1, 4)
        yield load


def one_by_one(names: list[str], rounds: int, levels: list[int], model: Path, work: Path, cpus: float) -> Rounds:
    """Each side is started, measured and stopped on its own."""
    figures: Rounds = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            with started(name, model, work, cpus) as load:
                figures[name].append({level: load(level, LEVELS[level]) for level in levels})
            print(f"round {number + 1} {name}: " + json.dumps(figures[name][-1]), flush=True)
    return figures


def together(names: list[str], rounds: int, levels: list[int], model: Path, work: Path, cpus: float) -> Rounds:
    """All sides stay up and take turns, some seconds each: a machine's ups and downs then hit all alike.

    Every other round goes backwards through the sides, so that no side always follows the same one.
    """
    figures: Rounds = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        loads = {name: stack.enter_context(started(name, model, work, cpus)) for name in names}
        for number in range(rounds):
            turn: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
            order = names[::-1] if number % 2 else names
            for level in levels:
                for name in order:
                    turn[name][level] = loads[name](level, LEVELS[level])
            for name in names:
                figures[name].append(turn[name])
                print(f"round {number + 1} {name}: " + json.dumps(turn[name]), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default="hycluster,vllm-uni,vllm,ray-serve-llm")
    parser.add_argument("--together", action="store_true", help="keep all sides up and let them take turns")
    parser.add_argument("--cpus", type=float, default=1, help="threads of the engine, on every side")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--callers", type=int, choices=LEVELS, help="at this level alone, for many rounds")
    args = parser.parse_args()
    names = args.sides.split(",")
    levels = [args.callers] if args.callers else list(LEVELS)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = tiny_llama.make(work / "model")
        way = together if args.together else one_by_one
        rounds = way(names, args.rounds, levels, model, work, args.cpus)
    if args.json:
        args.json.write_text(json.dumps(rounds, indent=1))
    report(rounds)


def report(rounds: Rounds) -> None:
    """Medians over rounds, and ratios against the base."""
    fields = ("tokens_s", "ttft_p50_ms", "ttft_p99_ms", "cpu_s_per_1k_tokens")

    def median(name: str, level: int, field: str) -> float:
        return statistics.median(float(figures[level][field]) for figures in rounds[name])

    base = BASE if BASE in rounds else next(iter(rounds))
    print(f"\n{'side':<15}{'callers':>8}{'tokens/s':>10}{'ratio':>7}{'TTFT p50':>10}{'p99 ms':>9}"
          f"{'cpu s/1k':>10}{'ratio':>7}{'failed':>8}")  # fmt: skip
    for level in next(iter(rounds.values()))[0]:
        for name, measured in rounds.items():
            speed, p50, p99, cpu = (median(name, level, field) for field in fields)
            failed = sum(figures[level]["failed"] for figures in measured)
            cpu_ratio = cpu / median(base, level, "cpu_s_per_1k_tokens")
            print(
                f"{name:<15}{level:>8}{speed:>10.0f}{speed / median(base, level, 'tokens_s'):>7.2f}"
                f"{p50:>10.1f}{p99:>9.1f}{cpu:>10.3f}{cpu_ratio:>7.2f}{failed:>8}"
            )


if __name__ == "__main__":
    main()
