"""What all processes of a service know of a request: this one's own ring first, then the others by the directory."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable
from typing import Any

import ray
from ray.actor import ActorHandle

from hycluster.directory.directory import FORGET_AFTER_S, REPORT_EVERY_S
from hycluster.observe.timelines import Question, recorder

# Every gateway has come by then: one round of syncs, and what the directory and they take to say it.
LONGEST_S = 2.5 * REPORT_EVERY_S
LOOK_EVERY_S = 0.1
# In the name of a row: its file, this, its number.
ROW_MARK = "#"

Told = list[dict[str, Any]]


async def timeline_of(directory: ActorHandle[Any] | None, request_id: str) -> dict[str, Any] | None:
    """A request's timeline as JSON; None if no process knows it (any more).

    Rows of several jobs over one input have the same name but for their job's: the latest is meant.
    """
    own = recorder.find(request_id)
    if directory is None or (own is not None and (own["id"] == request_id or ROW_MARK not in request_id)):
        return own
    many = ROW_MARK in request_id
    found = await _asked(directory, Question(secrets.token_hex(8), request_id), until_found=not many)
    if own is not None:
        found.append(own)
    return max(found, key=lambda each: (each["id"] == request_id, each["started"]), default=None)


async def slowest(
    directory: ActorHandle[Any] | None, most: int, model: str | None = None, *, bulk: bool = False
) -> Told:
    """The online requests that took longest, or rows of batch work, of all processes, the longest first."""
    if directory is None:
        return recorder.slowest(most, model, bulk=bulk)
    question = Question(secrets.token_hex(8), None, most, model, bulk)
    found = await _asked(directory, question, until_found=False)
    return sorted(found, key=lambda each: each["duration_s"], reverse=True)[:most]


def answer_questions(directory: ActorHandle[Any], questions: Iterable[Question]) -> None:
    """Say what this process knows. Who asked waits a moment for it, and nobody else."""
    for question in questions:
        if (found := recorder.answer(question)) is not None:
            directory.answer.remote(question.number, found)


async def _asked(directory: ActorHandle[Any], question: Question, *, until_found: bool) -> Told:
    """What the others say, and this process by its own gateways: it is asked like all of them."""
    found: Told = []
    try:
        async with asyncio.timeout(FORGET_AFTER_S):
            await directory.ask.remote(question.number, question)
            end_s = time.monotonic() + LONGEST_S
            while time.monotonic() < end_s and not (until_found and found):
                await asyncio.sleep(LOOK_EVERY_S)
                answers: list[Told] = await directory.answers.remote(question.number)
                found = [each for answer in answers for each in answer]
    except (ray.exceptions.RayError, TimeoutError):
        # The directory is starting again; what was heard until then is something.
        pass
    return found or (recorder.answer(question) or [])
