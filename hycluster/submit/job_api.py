"""Ray's job API over HTTP: give a cluster elsewhere a job, and see what became of it.

The calls are those of Ray's Jobs REST API
(https://docs.ray.io/en/latest/cluster/running-applications/job-submission/rest.html). Here what goes wrong gets a
field's name and one line, and records of jobs are read as ``hycluster batch run`` meant them.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from hycluster.errors import SettingsError, Unauthenticated, Unavailable, shown
from hycluster.retries import RetryingCaller
from hycluster.storage import masked, masked_line
from hycluster.submit.submission import NAME_KEY, Submission
from hycluster.submit.submitted import JobRecord, Submitted, submitted

CONNECT_S = 10.0
# Without a byte from the dashboard.
CALL_S = 60.0
# A follower waits as long for a cluster that does not answer: a head that is replaced takes about as much.
AWAY_S = 120.0
LOOK_EVERY_S = 2.0
SUBMIT_TRIES = 3
# Ray tells a log from its beginning each time: until the next look passes as many times what the last one took.
LOG_PAUSES = 9
# Ray kills what has not ended 3 s after its signal (RAY_JOB_STOP_WAIT_TIME_S, on the cluster).
CANCEL_S = 60.0
_SYSTEM_ERROR = re.compile(r"\[Errno -?\d+\] ([^'\")]+)")
_TOKEN = re.compile(r"[\x21-\x7e]+")

T = TypeVar("T")


class _Version(msgspec.Struct):
    ray_version: str


class _Logs(msgspec.Struct):
    logs: str


class JobApi:
    """The jobs that were submitted to one cluster.

    Args:
        address: of Ray's dashboard, ``http://HOST:8265``. A token is taken from where Ray takes it:
            ``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH`` or ``~/.ray/auth_token``, where ``RAY_AUTH_MODE`` is ``token``
            or one of the first two is set.

    Raises:
        SettingsError: there is no such thing at the address.
        Unauthenticated: the cluster asks for a token, or refuses this one; so does everything below.
    """

    def __init__(self, address: str) -> None:
        if not re.match(r"https?://[^/\s]", address):
            raise SettingsError(
                f"--address: {shown(address)} is not allowed; must be the address of Ray's dashboard,"
                " such as http://HOST:8265"
            )
        self._address = address.rstrip("/")
        self._token = _token()
        try:
            self._client = httpx.Client(
                base_url=self._address,
                headers={"Authorization": f"Bearer {self._token}"} if self._token else None,
                timeout=httpx.Timeout(CALL_S, connect=CONNECT_S),
                # There are seconds between two calls, and the head may be another one by then.
                limits=httpx.Limits(max_keepalive_connections=0),
            )
            response = self._client.get("/api/version", timeout=CONNECT_S)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self._refuse(_why(error))
        self._check_token(response)
        if response.is_redirect:
            self._refuse(f"it sends elsewhere, to {shown(response.headers['location'])}; give that address")
        if not response.is_success:
            self._refuse(f"/api/version: {_said(response)}")
        try:
            msgspec.json.decode(response.content, type=_Version)
        except msgspec.DecodeError as error:
            self._refuse(f"/api/version: {masked_line(error)}")

    def submit(self, submission: Submission) -> None:
        """Start a job. The cluster runs it whatever becomes of this process.

        A cluster that stumbles, such as a head whose agent is not up yet, is asked again.
        """
        again = RetryingCaller(
            attempts=SUBMIT_TRIES, timeout=None, wait_initial=LOOK_EVERY_S / 2, wait_jitter=LOOK_EVERY_S / 2
        )
        again(Unavailable, self._submit, submission)

    def _submit(self, submission: Submission) -> None:
        body = {
            "entrypoint": submission.command,
            "submission_id": submission.id,
            "metadata": submission.metadata,
            "runtime_env": {},
        }
        try:
            self._call("POST", "/api/jobs/", json=body)
        except Unavailable:
            # Its answer may have been lost; nobody else has this id.
            with suppress(SettingsError):
                self.look(submission.id)
                return
            raise

    def look(self, job_id: str) -> Submitted:
        """What became of a job.

        Raises:
            SettingsError: the cluster knows no such job.
            Unavailable: the cluster does not answer; so does everything below.
        """
        return submitted(self._read(JobRecord, _path(job_id), job_id))

    def jobs(self) -> list[Submitted]:
        """The batch jobs that the cluster knows, the newest first."""
        found = [
            submitted(one) for one in self._read(list[JobRecord], "/api/jobs/") if NAME_KEY in (one.metadata or {})
        ]
        return sorted(found, key=lambda job: job.started_at or 0.0, reverse=True)

    def log(self, job_id: str) -> str:
        """What a job has printed so far, and Ray's word on its start."""
        return self._read(_Logs, f"{_path(job_id)}/logs", job_id).logs

    def follow(self, job_id: str, write: Callable[[str], None]) -> Submitted:
        """Hand on a job's log as it grows, until the job has ended."""
        handed_on = 0
        while True:
            now = self._patiently(job_id)
            begun_s = time.monotonic()
            # A job that has ended has, whether or not its log is still to be had.
            with suppress(Unavailable):
                log = self.log(job_id)
                # What is written at this moment may be half a line, or half a character.
                end = len(log) if now.ended else log.rfind("\n") + 1
                if end > handed_on:
                    write(log[handed_on:end])
                    handed_on = end
            if now.ended:
                return now
            time.sleep(max(LOOK_EVERY_S / 2, LOG_PAUSES * (time.monotonic() - begun_s)))

    def wait(self, job_id: str, changed: Callable[[Submitted], None]) -> Submitted:
        """Look again and again until a job has ended; ``changed`` hears of each new state."""
        last: Submitted | None = None
        while True:
            now = self._patiently(job_id)
            if now != last:
                changed(now)
            if now.ended:
                return now
            last = now
            time.sleep(LOOK_EVERY_S)

    def cancel(self, job_id: str) -> tuple[bool, Submitted]:
        """Have a job stopped, and wait until it is: SIGTERM first, then SIGKILL. What is committed stays.

        Returns:
            Whether there was something to stop, and what became of the job.
        """
        before = self.look(job_id)
        if before.ended:
            return False, before
        self._call("POST", f"{_path(job_id)}/stop", job_id)
        deadline = time.monotonic() + CANCEL_S
        while not (now := self.look(job_id)).ended and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S / 4)
        return True, now

    def _patiently(self, job_id: str) -> Submitted:
        """As ``look``, but a cluster that is away for a while may come back."""
        patient = RetryingCaller(
            attempts=None,
            timeout=AWAY_S,
            wait_initial=LOOK_EVERY_S / 2,
            wait_max=2 * LOOK_EVERY_S,
            wait_jitter=LOOK_EVERY_S / 2,
        )
        return patient(Unavailable, self.look, job_id)

    def _read(self, kind: type[T], path: str, job_id: str | None = None) -> T:
        response = self._call("GET", path, job_id)
        try:
            return msgspec.json.decode(response.content, type=kind)
        except msgspec.DecodeError as error:
            raise self._unavailable(masked_line(error)) from None

    def _call(self, method: str, path: str, job_id: str | None = None, **body: Any) -> httpx.Response:
        try:
            response = self._client.request(method, path, **body)
        except httpx.HTTPError as error:
            raise self._unavailable(_why(error)) from None
        self._check_token(response)
        if job_id is not None and response.status_code == httpx.codes.NOT_FOUND:
            raise SettingsError(
                f"JOB_ID: {shown(job_id)} is not known at {self._address!r};"
                " 'hycluster batch jobs --address URL' lists what is"
            )
        if not response.is_success:
            raise self._unavailable(_said(response))
        return response

    def _check_token(self, response: httpx.Response) -> None:
        if response.status_code not in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            return
        if self._token is not None:
            raise Unauthenticated(f"RAY_AUTH_TOKEN: {self._address!r} refuses this token; give the cluster's own")
        raise Unauthenticated(
            f"RAY_AUTH_TOKEN: not set; {self._address!r} asks for its token"
            " (RAY_AUTH_MODE=token alone sends the one of ~/.ray/auth_token)"
        )

    def _refuse(self, why: str) -> NoReturn:
        raise SettingsError(f"--address: no Ray dashboard answers at {self._address!r}: {why}") from None

    def _unavailable(self, why: str) -> Unavailable:
        return Unavailable(f"--address: {self._address!r} does not answer as it should: {why}")


def _path(job_id: str) -> str:
    return f"/api/jobs/{quote(job_id, safe='')}"


def _token() -> str | None:
    """The cluster's token, from where Ray's own tools take it."""
    token, path = os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    # Who sets a token wants it sent.
    mode = os.environ.get("RAY_AUTH_MODE") or ("token" if token or path else "disabled")
    if mode.lower() != "token":
        return None
    field = "RAY_AUTH_TOKEN"
    if not token:
        field = "RAY_AUTH_TOKEN_PATH" if path else "RAY_AUTH_MODE"
        file = Path(path or "~/.ray/auth_token").expanduser()
        if not path and not file.exists():
            return None
        try:
            token = file.read_text(errors="replace")
        except OSError as error:
            raise SettingsError(f"{field}: {str(file)!r} can't be read: {error.strerror}") from None
    token = token.strip()
    if not _TOKEN.fullmatch(token):
        # Nothing of it is shown: it is somebody's secret, if perhaps not this cluster's.
        what = "holds characters that no token has; it must be one word of ASCII" if token else "holds no token"
        raise SettingsError(f"{field}: {what}")
    return token


def _why(error: Exception) -> str:
    """The last word of an error: what the system says, where it is from there."""
    text = masked_line(error)
    return system[1] if (system := _SYSTEM_ERROR.search(text)) else text


def _said(response: httpx.Response) -> str:
    """The last line of a refusal: the dashboard may answer with a whole stack, and what is before it with a page."""
    lines = [" ".join(line.split()) for line in response.text.splitlines() if line.strip()]
    status = f"{response.status_code} {response.reason_phrase}"
    if not lines or "html" in response.headers.get("content-type", ""):
        return status
    last = masked(lines[-1][:500])
    return last if len(lines) > 1 else f"{status}: {last}"
