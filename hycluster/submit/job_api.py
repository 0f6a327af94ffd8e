"""Ray's job API over HTTP: give a cluster elsewhere a job, and see what became of it.

Ray's own client does the talking. Here its errors get a field's name and one line, and its records of a job are read as
``hycluster batch run`` meant them. Pinned to Ray 2.60.0: the client tells the status of a refusal in its message only,
and its calls can be given a timeout by a private method only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from hycluster.errors import SettingsError, Unauthenticated, Unavailable, shown
from hycluster.storage import one_line
from hycluster.submit.submission import NAME_KEY, Submission
from hycluster.submit.submitted import Submitted, submitted

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CONNECT_S = 10.0
# Without a byte from the dashboard.
CALL_S = 60.0
# A follower waits as long for a cluster that does not answer: a head that is replaced takes about as much.
AWAY_S = 120.0
LOOK_EVERY_S = 2.0
# Ray kills what has not ended 3 s after its signal (RAY_JOB_STOP_WAIT_TIME_S, on the cluster).
CANCEL_S = 60.0
_NOT_FOUND = re.compile(r"status code 404")
# What Ray's client and requests raise for a dashboard that is away, that refuses, and that is none.
_TROUBLE = (OSError, RuntimeError, ValueError, LookupError)
_SYSTEM_ERROR = re.compile(r"\[Errno -?\d+\] ([^'\")]+)")


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
        self._client = self._connected()

    def submit(self, submission: Submission) -> None:
        """Start a job. The cluster runs it whatever becomes of this process."""
        with self._asking():
            self._client.submit_job(
                entrypoint=submission.command, submission_id=submission.id, metadata=dict(submission.metadata)
            )

    def look(self, job_id: str) -> Submitted:
        """What became of a job.

        Raises:
            SettingsError: the cluster knows no such job.
            Unavailable: the cluster does not answer; so does everything below.
        """
        with self._asking(job_id):
            return submitted(self._client.get_job_info(job_id))

    def jobs(self) -> list[Submitted]:
        """The batch jobs that the cluster knows, the newest first."""
        with self._asking():
            details = self._client.list_jobs()
        found = [submitted(one) for one in details if NAME_KEY in (one.metadata or {})]
        return sorted(found, key=lambda job: job.started_at or 0.0, reverse=True)

    def log(self, job_id: str) -> str:
        """What a job has printed so far, and Ray's word on its start."""
        with self._asking(job_id):
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, write: Callable[[str], None]) -> Submitted:
        """Hand on a job's log as it grows, until the job has ended."""
        import aiohttp

        log = _Log(write)
        while True:
            now = self._patiently(job_id)
            try:
                asyncio.run(log.tail(self._client, job_id))
            except (aiohttp.ClientError, OSError, RuntimeError):
                # Cut off, or what is in between lets no websocket through.
                with suppress(Unavailable):
                    log.hand_on(self.log(job_id))
            if now.ended:
                return now
            time.sleep(LOOK_EVERY_S / 4)

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
        with self._asking(job_id):
            self._client.stop_job(job_id)
        deadline = time.monotonic() + CANCEL_S
        while not (now := self.look(job_id)).ended and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S / 4)
        return True, now

    def _patiently(self, job_id: str) -> Submitted:
        """As ``look``, but a cluster that is away for a while may come back."""
        deadline = time.monotonic() + AWAY_S
        while True:
            try:
                return self.look(job_id)
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
            time.sleep(LOOK_EVERY_S)

    def _connected(self) -> JobSubmissionClient:
        if "RAY_AUTH_MODE" not in os.environ and {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            # Who sets a token wants it sent; Ray reads the mode once, when it is imported.
            os.environ["RAY_AUTH_MODE"] = "token"
        # Ray's client prefers what these say to the address that it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = self._address
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        for name in ("ray", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            # Ray's client itself waits for minutes where nobody answers.
            requests.get(f"{self._address}/api/version", timeout=CONNECT_S)
            client = JobSubmissionClient(self._address)
        except AuthenticationError as error:
            raise self._unauthenticated(str(error)) from None
        except _TROUBLE as error:
            raise SettingsError(f"--address: no Ray dashboard answers at {self._address!r}: {_why(error)}") from None
        # It has no timeouts of its own; what it is given here goes to requests as it is.
        client._do_request = partial(client._do_request, timeout=CALL_S)  # type: ignore[method-assign]
        return client

    @contextmanager
    def _asking(self, job_id: str | None = None) -> Iterator[None]:
        """Ray's errors in our words."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise self._unauthenticated(str(error)) from None
        except _TROUBLE as error:
            if job_id is not None and _NOT_FOUND.search(str(error)):
                raise SettingsError(
                    f"JOB_ID: {shown(job_id)} is not known at {self._address!r};"
                    " 'hycluster batch jobs --address URL' lists what is"
                ) from None
            raise Unavailable(f"--address: {self._address!r} does not answer as it should: {_why(error)}") from None

    def _unauthenticated(self, said: str) -> Unauthenticated:
        if "invalid" in said.lower():
            return Unauthenticated(f"RAY_AUTH_TOKEN: {self._address!r} refuses this token; give the cluster's own")
        return Unauthenticated(
            f"RAY_AUTH_TOKEN: not set; {self._address!r} asks for its token"
            " (RAY_AUTH_MODE=token alone sends the one of ~/.ray/auth_token)"
        )


class _Log:
    """What of a log has been handed on: a new connection tells it from its beginning."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._handed_on = 0

    async def tail(self, client: JobSubmissionClient, job_id: str) -> None:
        told = ""
        async for text in client.tail_job_logs(job_id):
            told += text
            self.hand_on(told)

    def hand_on(self, log: str) -> None:
        """Hand on what is new in a log."""
        if len(log) > self._handed_on:
            self._write(log[self._handed_on :])
            self._handed_on = len(log)


def _why(error: BaseException) -> str:
    """The last word of an error: requests and Ray wrap it up, and the dashboard may answer with a whole stack."""
    text = one_line(error)
    if system := _SYSTEM_ERROR.search(text):
        return system[1]
    lines = [line for line in str(error).rstrip("\n .").splitlines() if line.strip()]
    return text if len(lines) < 2 else " ".join(lines[-1].split())
