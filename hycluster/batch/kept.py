"""Answers of shards that are not committed yet, kept in the output: what is lost by a kill is half a minute's work.

A shard is committed when its last row is through, which may take long; the plan of shards is a function of the input,
so they can't be cut by time. Each process writes down now and then what it has in hand, in a file of its own in
``_answers``, and begins with what those before it have left there. Nothing else reads it; at the end it goes.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict

from hycluster.batch.output.commit import ANSWERS, OutputFolder
from hycluster.batch.output.record import DAMAGE
from hycluster.batch.refusal import Refusal
from hycluster.batch.task import Answer
from hycluster.storage import masked_line

KEEP_EVERY_S = 30.0
log = logging.getLogger(__name__)


class KeptAnswers:
    """What one process has in hand. A store that does not take it is none of the job's."""

    def __init__(self, output: OutputFolder) -> None:
        self._output = output
        self._name = uuid.uuid4().hex[:12]
        self._answers: dict[str, Answer | Refusal] = {}
        self._found: dict[str, Answer | Refusal] = {}
        self._written_s = time.monotonic()
        self._changed = False

    def load(self) -> None:
        """Read what the processes before this one have left."""
        end = f"-{self._output.edition()}.json"
        try:
            names = [name for name in self._output.folder.names(ANSWERS) if name.endswith(end)]
            for name in names:
                kept = self._output.folder.read_json(f"{ANSWERS}/{name}") or {}
                self._found |= {row_id: _answer(data) for row_id, data in kept.items()}
        except (OSError, *DAMAGE) as error:
            # Asked again, then.
            log.warning("%s: can't be read: %s", ANSWERS, masked_line(error))

    def get(self, row_id: str) -> Answer | Refusal | None:
        return self._found.get(row_id)

    def add(self, row_id: str, answer: Answer | Refusal) -> None:
        self._answers[row_id] = answer
        self._changed = True

    def forget(self, row_ids: Iterable[str]) -> None:
        """These are committed."""
        for row_id in row_ids:
            self._answers.pop(row_id, None)
            self._found.pop(row_id, None)

    def due(self) -> bool:
        return self._changed and time.monotonic() - self._written_s >= KEEP_EVERY_S

    def write(self) -> None:
        """Write down all that is not committed, in the place of what was written before."""
        self._written_s, self._changed = time.monotonic(), False
        data = json.dumps({row_id: asdict(answer) for row_id, answer in list(self._answers.items())}).encode()
        try:
            self._output.folder.make(ANSWERS)
            self._output.folder.replace(f"{ANSWERS}/{self._name}-{self._output.edition()}.json", data)
        except OSError as error:
            log.warning("%s: can't be written: %s", ANSWERS, masked_line(error))


def _answer(data: dict[str, object]) -> Answer | Refusal:
    if "error_type" in data:
        return Refusal(**data)  # type: ignore[arg-type]
    extra = data.get("extra") or ()
    return Answer(**{**data, "extra": tuple(extra)})  # type: ignore[arg-type]
