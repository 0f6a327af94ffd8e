"""Against a stand-in for the cluster; tests/integration/test_submit.py has a real one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hycluster.errors import SettingsError, Unauthenticated, Unavailable
from hycluster.submit import job_api
from hycluster.submit.job_api import JobApi
from hycluster.submit.submission import Submission
from tests.submit.job_api_server import JobApiServer, job_api_server
from tests.waiting import PATIENCE_S

SENT = Submission(
    "nightly-x7k2pq", "exec hycluster", {"hycluster_job": "nightly", "hycluster_output": "s3://b/out"}, ()
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobApiServer]:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    # What Ray's own tools prefer to the address that they are given.
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setattr(job_api, "LOOK_EVERY_S", 0.02)
    with job_api_server() as running:
        yield running


def test_a_job_is_submitted_and_found_again(server: JobApiServer) -> None:
    api = JobApi(f"{server.address}/")
    api.submit(SENT)
    assert server.jobs[SENT.id]["entrypoint"] == SENT.command
    now = api.look(SENT.id)
    assert (now.id, now.name, now.output, now.state) == (SENT.id, "nightly", "s3://b/out", "waiting")


def test_a_cluster_that_stumbles_is_given_the_job_once(server: JobApiServer) -> None:
    api = JobApi(server.address)
    server.away = 1
    api.submit(SENT)
    assert server.submits == 1
    # It was taken, and the answer lost.
    server.away = 1
    api.submit(SENT)
    assert server.submits == 1
    del server.jobs[SENT.id]
    server.away = 1_000_000
    with pytest.raises(Unavailable, match=r"GCS is away$"):
        api.submit(SENT)


def test_jobs_lists_ours_the_newest_first(server: JobApiServer) -> None:
    server.add("ours-1", "SUCCEEDED", start_time=1000, metadata=SENT.metadata)
    server.add("ours-2", "RUNNING", start_time=2000, metadata=SENT.metadata)
    server.add("theirs", "RUNNING", start_time=3000)
    assert [job.id for job in JobApi(server.address).jobs()] == ["ours-2", "ours-1"]


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "auto", "http://", "8265"])
def test_other_addresses_are_refused_before_they_are_tried(address: str) -> None:
    with pytest.raises(SettingsError, match=r"^--address: .* is not allowed; must be the address of Ray's dashboard"):
        JobApi(address)


def test_where_nobody_answers_is_said_in_a_line(server: JobApiServer) -> None:
    with pytest.raises(SettingsError, match=r"^--address: no Ray dashboard answers at '.*': Connection refused$"):
        JobApi("http://127.0.0.1:9")
    with pytest.raises(SettingsError, match=r"^--address: no Ray dashboard answers at '.*/x': /api/version: 404 Not"):
        JobApi(f"{server.address}/x")
    server.page = "<html>\n<h1>no upstream</h1>\n</html>"
    with pytest.raises(SettingsError, match=r"^--address: no Ray dashboard .*: /api/version: 502 Bad Gateway$"):
        JobApi(server.address)
    server.page, server.elsewhere = None, "https://sso.example.org"
    with pytest.raises(SettingsError, match=r": it sends elsewhere, to 'https://sso.example.org/api/version'; "):
        JobApi(server.address)


def test_unknown_ids_name_the_field(server: JobApiServer) -> None:
    api = JobApi(server.address)
    for call in (api.look, api.log, api.cancel, lambda job_id: api.follow(job_id, print)):
        for unknown in ("nope", "nope/../logs", "?"):
            with pytest.raises(SettingsError, match=r"^JOB_ID: '(nope.*|\?)' is not known at .*; 'hycluster "):
                call(unknown)


def test_a_cluster_that_asks_for_a_token_is_named(server: JobApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "right"
    with pytest.raises(Unauthenticated, match=r"^RAY_AUTH_TOKEN: not set; 'http://.*' asks for its token"):
        JobApi(server.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(Unauthenticated, match=r"^RAY_AUTH_TOKEN: 'http://.*' refuses this token"):
        JobApi(server.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right\n")
    api = JobApi(server.address)
    assert api.jobs() == []
    server.token = "newer"
    with pytest.raises(Unauthenticated, match=r"^RAY_AUTH_TOKEN: .* refuses this token"):
        api.jobs()


def test_a_token_is_found_where_ray_finds_it(
    server: JobApiServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.token = "right"
    monkeypatch.setenv("HOME", str(tmp_path))
    file, home_s = tmp_path / "token", tmp_path / ".ray" / "auth_token"
    home_s.parent.mkdir()
    home_s.write_text("right\n")
    with pytest.raises(Unauthenticated, match="not set"):
        JobApi(server.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    JobApi(server.address)
    home_s.unlink()
    with pytest.raises(Unauthenticated, match="not set"):
        JobApi(server.address)
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    with pytest.raises(SettingsError, match=r"^RAY_AUTH_TOKEN_PATH: '.*/token' can't be read: No such file or dir"):
        JobApi(server.address)
    file.write_text(" \n")
    with pytest.raises(SettingsError, match=r"^RAY_AUTH_TOKEN_PATH: holds no token$"):
        JobApi(server.address)
    file.write_text("right\n")
    JobApi(server.address)
    # The token itself goes before the file.
    monkeypatch.setenv("RAY_AUTH_TOKEN", "two words")
    with pytest.raises(SettingsError, match=r"^RAY_AUTH_TOKEN: holds characters that no token has") as caught:
        JobApi(server.address)
    assert "words" not in str(caught.value)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(Unauthenticated, match="not set"):
        JobApi(server.address)


def test_trouble_over_there_is_one_line(server: JobApiServer) -> None:
    api = JobApi(server.address)
    server.away = 1
    with pytest.raises(Unavailable, match=r"^--address: '.*' does not answer as it should: RpcError: GCS is away$"):
        api.look("nope")
    server.jobs["a"] = {"submission_id": "a", "status": "LOST"}
    with pytest.raises(Unavailable, match=r"^--address: '.*' does not answer as it should: Invalid enum value 'LOST'"):
        api.look("a")


def test_a_dashboard_that_hangs_is_given_up(server: JobApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_api, "CALL_S", 0.05)
    api = JobApi(server.address)
    server.hang_s = 0.3
    with pytest.raises(Unavailable, match=r"^--address: .* timed out|^--address: .*[Tt]imeout"):
        api.look("a")


def test_cancel_waits_for_the_end_and_leaves_what_has_ended(server: JobApiServer) -> None:
    api = JobApi(server.address)
    server.add("a", "RUNNING")
    stopped, now = api.cancel("a")
    assert (stopped, now.state) == (True, "cancelled")
    server.add("b", "SUCCEEDED")
    stopped, now = api.cancel("b")
    assert (stopped, now.state) == (False, "finished")
    assert server.jobs["b"]["status"] == "SUCCEEDED"


def test_a_log_is_followed_to_the_end_by_whole_lines_and_over_an_outage(server: JobApiServer) -> None:
    server.add("a", "RUNNING")
    # What Ray reads of a character that is half written is not what it becomes.
    server.logs["a"] = "one\ntw\ufffd\ufffd"
    told: list[str] = []
    heard = threading.Event()

    def write(text: str) -> None:
        told.append(text)
        heard.set()

    def go_on() -> None:
        heard.wait(PATIENCE_S)
        server.away = 2
        server.logs["a"] = "one\ntwó\nthree"
        server.add("a", "FAILED", driver_exit_code=3)

    thread = threading.Thread(target=go_on)
    thread.start()
    ended = JobApi(server.address).follow("a", write)
    thread.join()
    assert (ended.state, ended.exit_code) == ("failed", 3)
    assert told == ["one\n", "twó\nthree"]


def test_waiting_tells_each_state_once_and_gives_up_on_a_cluster_that_stays_away(
    server: JobApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("a", "PENDING")
    api = JobApi(server.address)
    states: list[str] = []
    following = {"waiting": "RUNNING", "running": "SUCCEEDED"}

    def changed(state: str) -> None:
        states.append(state)
        if state in following:
            server.add("a", following[state])

    assert api.wait("a", lambda job: changed(job.state)).exit_code == 0
    assert states == ["waiting", "running", "finished"]
    monkeypatch.setattr(job_api, "AWAY_S", 0.1)
    server.away = 1_000_000
    with pytest.raises(Unavailable):
        api.wait("a", lambda job: None)
