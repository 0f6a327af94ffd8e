"""Ray's own client against a stand-in for the cluster; tests/integration/test_submit.py has a real one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from hycluster.errors import SettingsError, Unauthenticated, Unavailable
from hycluster.submit import job_api
from hycluster.submit.job_api import JobApi
from hycluster.submit.submission import Submission
from tests.submit.job_api_server import JobApiServer, job_api_server

SENT = Submission(
    "nightly-x7k2pq", "exec hycluster", {"hycluster_job": "nightly", "hycluster_output": "s3://b/out"}, ()
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobApiServer]:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    # The client writes both; monkeypatch puts back what was there.
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(job_api, "LOOK_EVERY_S", 0.02)
    with job_api_server() as running:
        yield running


def test_a_job_is_submitted_and_found_again(server: JobApiServer) -> None:
    api = JobApi(f"{server.address}/")
    api.submit(SENT)
    assert server.jobs[SENT.id]["entrypoint"] == SENT.command
    now = api.look(SENT.id)
    assert (now.id, now.name, now.output, now.state) == (SENT.id, "nightly", "s3://b/out", "waiting")


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
    with pytest.raises(SettingsError, match=r"^--address: no Ray dashboard answers at '[^']*/x': Version check.*404"):
        JobApi(f"{server.address}/x")


def test_unknown_ids_name_the_field(server: JobApiServer) -> None:
    api = JobApi(server.address)
    for call in (api.look, api.log, api.cancel, lambda job_id: api.follow(job_id, print)):
        with pytest.raises(SettingsError, match=r"^JOB_ID: 'nope' is not known at .*; 'hycluster batch jobs"):
            call("nope")


def test_a_cluster_that_asks_for_a_token_is_named(server: JobApiServer) -> None:
    server.token = "right"
    # Ray settles once a process whether it sends one; tests/integration/test_submit.py tells the two apart.
    with pytest.raises(
        Unauthenticated, match=r"^RAY_AUTH_TOKEN: (not set; )?'http://.*' (asks for its|refuses this) token"
    ):
        JobApi(server.address)


def test_trouble_over_there_is_one_line(server: JobApiServer) -> None:
    api = JobApi(server.address)
    server.away = 1
    with pytest.raises(Unavailable, match=r"^--address: '.*' does not answer as it should: RpcError: GCS is away"):
        api.look("nope")


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


# Ray's own, towards aiohttp.
@pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")
def test_a_log_is_followed_to_the_end_without_websockets_and_over_an_outage(server: JobApiServer) -> None:
    server.add("a", "RUNNING")
    server.logs["a"] = "one\n"
    told: list[str] = []
    heard = threading.Event()

    def write(text: str) -> None:
        told.append(text)
        heard.set()

    def go_on() -> None:
        heard.wait(10)
        server.away = 2
        server.logs["a"] += "two\nthree\n"
        server.add("a", "FAILED", driver_exit_code=3)

    thread = threading.Thread(target=go_on)
    thread.start()
    ended = JobApi(server.address).follow("a", write)
    thread.join()
    assert (ended.state, ended.exit_code) == ("failed", 3)
    assert told == ["one\n", "two\nthree\n"]


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
