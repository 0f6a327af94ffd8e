"""A stand-in for the HTTP side of Ray's job API, which runs nothing: a test says what becomes of the jobs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ray


@dataclass
class JobApiServer:
    """What it holds.

    Attributes:
        jobs: by id, as Ray's API tells them; ``logs`` likewise.
        token: that it asks for; None asks for none.
        hang_s: seconds before each answer.
        elsewhere: where it sends all who come.
        page: what something in front of it answers, as HTML.
        submits: jobs that it has taken.
        away: answers to so many calls are 500, as long as the cluster's state is not to be had.
    """

    address: str = ""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    hang_s: float = 0
    away: int = 0
    submits: int = 0
    elsewhere: str | None = None
    page: str | None = None

    def add(self, job_id: str, status: str, **more: Any) -> None:
        self.jobs[job_id] = {"type": "SUBMISSION", "submission_id": job_id, "status": status, "entrypoint": "e", **more}

    def answer(self, method: str, path: str, token: str | None, body: dict[str, Any]) -> tuple[int, Any]:
        if self.token is not None and token != f"Bearer {self.token}":
            return (403, "Forbidden: Invalid authentication token") if token else (401, "Unauthorized: Missing token")
        if path == "/api/version":
            return 200, {"ray_version": ray.__version__}
        if self.away:
            self.away -= 1
            return 500, "Traceback (most recent call last):\n  ...\nRpcError: GCS is away\n"
        if path == "/api/jobs/" and method == "POST":
            self.submits += 1
            self.add(body["submission_id"], "PENDING", metadata=body["metadata"])
            self.jobs[body["submission_id"]]["entrypoint"] = body["entrypoint"]
            return 200, {"job_id": body["submission_id"], "submission_id": body["submission_id"]}
        if path == "/api/jobs/":
            return 200, list(self.jobs.values())
        job_id, _, what = path.removeprefix("/api/jobs/").partition("/")
        if job_id not in self.jobs:
            return 404, f"Job {job_id} does not exist"
        if what == "stop":
            self.jobs[job_id]["status"] = "STOPPED"
            return 200, {"stopped": True}
        if what == "logs":
            return 200, {"logs": self.logs.get(job_id, "")}
        return 200, self.jobs[job_id]


@contextmanager
def job_api_server() -> Iterator[JobApiServer]:
    held = JobApiServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}") if length else {}
            time.sleep(held.hang_s)
            status, said = held.answer(self.command, self.path, self.headers.get("Authorization"), body or {})
            data = (said if isinstance(said, str) else json.dumps(said)).encode()
            if held.elsewhere:
                self.send_response(307)
                self.send_header("Location", held.elsewhere + self.path)
            elif held.page:
                data = held.page.encode()
                self.send_response(502)
                self.send_header("Content-Type", "text/html")
            else:
                self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            # Who has given up reads nothing more.
            with suppress(OSError):
                self.end_headers()
                self.wfile.write(data)

        do_POST = do_GET

        def log_request(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
