"""What a running job says of itself, in the output folder: so that its status can be seen from any machine.

A word every few seconds in ``_progress.json``, each in the place of the one before. Nothing depends on it: it
holds what the shards' records don't tell, and whoever finds it old knows that the job has stopped.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Self

from hycluster.batch.output.record import Totals
from hycluster.batch.progress.terminal import RunProgress
from hycluster.storage import Folder, WritableFolder, masked_line

PROGRESS = "_progress.json"
TELL_EVERY_S = 5.0
# A job is silent for longer than this only if it has stopped.
SILENT_S = 60.0
STOPPED = "stopped; its own command resumes it"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProgressEntry:
    """One word of a run.

    Attributes:
        told_at: seconds since the epoch, by the clock of the machine that runs the job.
        earlier_rows: committed before this run began.
        progress: of this run.
        ended: why the run has ended, if it has.
    """

    told_at: float
    earlier_rows: int
    progress: RunProgress
    ended: str | None = None


class Teller:
    """Says how far a run is; where its block ends by an error, what it heard last, too.

    Args:
        edition: of the output, see ``Output.edition``; a word of another one is not believed.
        earlier_rows: rows that earlier runs have committed.
    """

    def __init__(self, output: WritableFolder, edition: str, earlier_rows: int) -> None:
        self._output = output
        self._edition = edition
        self._earlier_rows = earlier_rows
        self._told_s = float("-inf")
        self._unsaid: RunProgress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._unsaid is not None:
            self._say(self._unsaid)

    def tell(self, progress: RunProgress) -> None:
        """Write it down, if the last time is long enough ago. A store that does not take it is none of the job's."""
        self._unsaid = progress
        if time.monotonic() - self._told_s >= TELL_EVERY_S:
            self._say(progress)

    def _say(self, progress: RunProgress) -> None:
        self._told_s, self._unsaid = time.monotonic(), None
        _write(self._output, self._edition, ProgressEntry(time.time(), self._earlier_rows, progress))

    def end(self) -> None:
        """The run is over and needs nobody to know how far it is."""
        self._output.delete([PROGRESS])


def tell_end(output: WritableFolder, edition: str, why: str) -> None:
    """Say why a run has ended before its job was done, so that nobody waits until it has been silent for long."""
    said = last_word(output, edition) or ProgressEntry(0.0, 0, RunProgress())
    ended = replace(said, told_at=time.time(), ended=why)
    if _write(output, edition, ended):
        return
    # On a disk that is full the word before makes room; without any nobody says that the job runs.
    with suppress(OSError):
        output.delete([PROGRESS])
    _write(output, edition, ended)


def _write(output: WritableFolder, edition: str, entry: ProgressEntry) -> bool:
    try:
        output.replace(PROGRESS, json.dumps({"edition": edition, **asdict(entry)}).encode())
    except OSError as error:
        log.debug("%s: can't be written: %s", PROGRESS, masked_line(error))
        return False
    return True


def last_word(output: Folder, edition: str) -> ProgressEntry | None:
    """What the job said last; None if it said nothing that can be understood."""
    try:
        data = output.read_json(PROGRESS)
        if data is None or data["edition"] != edition:
            return None
        said = data["progress"]
        progress = RunProgress(
            Totals(**said["done"]),
            said["in_flight"],
            said["retries"],
            dict(said["reasons"]),
            said.get("parked", 0),
            said.get("processes", 0),
        )
        return ProgressEntry(float(data["told_at"]), int(data["earlier_rows"]), progress, data.get("ended"))
    except (OSError, ValueError, KeyError, TypeError):
        # Half written, or by another version: the records are what counts.
        return None
