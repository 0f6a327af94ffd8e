from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner

from hycluster.cli import app
from hycluster.errors import (
    HyclusterError,
    NotFound,
    PermissionDenied,
    SettingsError,
    Unauthenticated,
    Unavailable,
)
from hycluster.ingress import errors, timelines
from hycluster.stages import summed_up, timeline_json
from hycluster.terminal import console
from hycluster.why import KIND_HEADER, ROUTE, _list
from tests.timelines import migrated, usual


@pytest.fixture(scope="module")
def ingress() -> Iterator[str]:
    """What the route of an HTTP ingress answers (tests/ingress/test_tracing.py has the route itself)."""

    class Route(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = unquote(self.path).partition("?")
            known: dict[str, Any] = {
                "usual": timeline_json(usual()) | {"instance": "a:1"},
                "a/b.parquet#3": timeline_json(migrated()),
            }
            asked = path.removeprefix("/hycluster/requests").removeprefix("/")
            body: Any = (
                known.get(asked)
                if asked
                else {"requests": [summed_up(usual())] * query.count("slowest=2") * (1 - query.count("priority=batch"))}
            )
            refused = {"broken": 500, "keyless": 401, "unscoped": 403}
            self.send_response(200 if body is not None else refused.get(asked, 404))
            if asked != "closed":
                self.send_header(KIND_HEADER, "NotFound")
            self.end_headers()
            self.wfile.write(json.dumps(body or {"error": {"message": f"{asked}: why"}}).encode())

        def log_message(self, format: str, *_: Any) -> None:  # noqa: A002
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Route)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def why(*arguments: str) -> str:
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["why", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_the_route_is_the_ingresses() -> None:
    assert (ROUTE, KIND_HEADER) == (timelines.PATH, errors.KIND_HEADER)


def test_a_table_and_a_bar(ingress: str) -> None:
    lines = [line.rstrip() for line in why("usual", "--address", ingress).splitlines()]
    assert lines[0].startswith("r  tiny  ok  2.20 s  since 2027-01-15")
    assert " at ingress a:1; " in lines[1]
    assert "first token after 1.00 s; 10 tokens in (0 cached), 8 out" in lines[1]
    decode = next(line for line in lines if line.startswith("decode"))
    assert decode.split()[1:7] == ["1.00", "s", "1.00", "s", "45%", "█" * 14]
    assert decode.endswith("its output computed, token by token (r0)")
    shares = [int(word[:-1]) for line in lines for word in line.split() if word[:-1].isdigit() and word.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=3)
    assert lines[-1].startswith("routed to r0 at 300.0 ms (tokens there: r0: 5, r1: 7)")


def test_a_rows_id_has_slashes_and_a_move_is_told(ingress: str) -> None:
    text = why("a/b.parquet#3", "--address", f"{ingress}/")
    assert "migrated from r0 to r1 with 3 tokens" in text
    assert "migrate " in text


def test_json_is_as_its_readers_have_it(ingress: str) -> None:
    said = json.loads(why("usual", "--address", ingress, "--json"))
    assert (said["request_id"], said["model"], said["total_s"]) == ("r", "tiny", 2.2)
    assert [stage["name"] for stage in said["stages"]][:3] == ["receive", "prepare", "send"]
    assert said["stages"][3]["replica"] == "r0"
    assert sum(stage["duration_s"] for stage in said["stages"]) == pytest.approx(2.2)
    assert said["events"][0] == {"name": "received", "at_s": 0.0, "attributes": {}}
    assert len(json.loads(why("--slowest", "2", "--model", "tiny", "--address", ingress, "--json"))["requests"]) == 1


def test_a_list(ingress: str) -> None:
    assert why("--slowest", "3", "--model", "m", "--address", ingress) == (
        "no online request of 'm' is known; of others tells --priority batch\n"
    )
    assert why("--slowest", "2", "--priority", "batch", "--address", ingress) == (
        "no row of batch work is known; of others tells --priority online\n"
    )
    header, line = why("--slowest", "2", "--address", ingress).splitlines()
    assert header.split() == ["request", "model", "status", "started", "time", "first", "token", "mostly"]
    assert line.split()[:3] + line.split()[-1:] == ["r", "tiny", "ok", "decode"]


@pytest.mark.parametrize("columns", ["80", None])
def test_ids_are_whole_wherever_they_are_read(
    columns: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    screen = console()
    ids = ["3f0c1d2e4b5a69788796a5b4c3d2e1f0", "6c1d"]
    listed = [summed_up(usual()) | {"id": each, "model": "smollm2-135m-instruct"} for each in ids]
    screen.print(_list(listed, screen.width))
    said = capsys.readouterr().out
    assert all(each in said.split() for each in ids)
    assert max(map(len, said.splitlines())) <= screen.width
    if columns is None:
        # A line each, for grep.
        assert [line.split()[:2] for line in said.splitlines()[1:]] == [[each, "smollm2-135m-instruct"] for each in ids]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((), SettingsError, "REQUEST_ID, --slowest: exactly one must be given"),
        (("r", "--slowest", "3"), SettingsError, "REQUEST_ID, --slowest: exactly one must be given"),
        (("r", "--model", "m"), SettingsError, "--model: goes with --slowest only"),
        (("r", "--priority", "batch"), SettingsError, "--priority: goes with --slowest only"),
        (("r", "--address", "ftp://x"), SettingsError, "--address: 'ftp://x' is not allowed"),
        (("r", "--address", "http://127.0.0.1:9"), Unavailable, "--address: http://127.0.0.1:9 does not answer"),
        (
            ("nobody", "--address", "INGRESS"),
            NotFound,
            "'nobody'; each keeps its last ones only, and none that was refused before an engine was asked$",
        ),
        (("a.parquet#0", "--address", "INGRESS"), NotFound, "a batch job's rows they are gone with the job's process$"),
        (("broken", "--address", "INGRESS"), HyclusterError, "answered 500: broken: why"),
        (("keyless", "--address", "INGRESS"), Unauthenticated, r"--address: http://\S+: keyless: why$"),
        (("unscoped", "--address", "INGRESS"), PermissionDenied, r"--address: http://\S+: unscoped: why$"),
        (("closed", "--address", "INGRESS"), SettingsError, "http.ui is off there"),
    ],
)
def test_what_is_wrong_is_named(ingress: str, arguments: tuple[str, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        why(*(ingress if word == "INGRESS" else word for word in arguments))
