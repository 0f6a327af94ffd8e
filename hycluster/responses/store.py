"""Stored responses, in ``responses/`` of the batches' store: a folder or an ``s3://`` prefix, and nothing else.

Layout:
    asked/<response>.json       what was asked, and what was answered or, in the background, begun
    open/<response>             empty: is being answered in the background
    claims/<response>.<n>.json  which process answers it, the n-th that does
    alive/<process>.json        changes as long as the process lives and has something to answer
    events/<response>.<n>.json  pieces of its stream of events, if that was asked for
    ended/<response>.json       how it ended: of all that would end it, one creates this

No record is written twice but ``alive``, and who is to be the only one to write a record creates it: ingress processes
need no lock, and none that is late undoes what another one has told its callers.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from hycluster.auth.caller import is_own
from hycluster.errors import NotFound, shown
from hycluster.responses.records import RESPONSE_ID, EndedResponse, StoredResponse, made_at
from hycluster.settings.ingress import Batches, Responses
from hycluster.storage import WritableFolder, leftover_of, locate

FOLDERS = ("asked", "open", "claims", "alive", "events", "ended")
GIB = 1 << 30
# Age of what has no record any more, or not yet.
ORPHANED_S = 3600.0
# What is stored between two looks at the bounds, as a part of them.
LOOK_EVERY = 16


@dataclass(frozen=True, slots=True)
class Claim:
    """Who answers a response in the background.

    Attributes:
        number: how many have before.
        holder: the process; empty if it has given the response back.
        deaths: how many of those before died over it.
    """

    number: int
    holder: str
    deaths: int


class ResponseStore:
    """All stored responses of a service; where callers are known, those of the current one's project. Every method
    blocks; any number of processes may use one folder."""

    def __init__(self, settings: Responses, batches: Batches) -> None:
        self.folder: WritableFolder = locate(batches.place, "batches.store").writable().below("responses")
        self._keep_s = settings.keep_days * 86400
        self._most = settings.max_stored
        self._most_bytes = settings.max_stored_gib * GIB
        self._stored = 0
        self._stored_bytes = 0
        self._counting = threading.Lock()
        self._made = False

    # -- what is asked for ------------------------------------------------------------------------------

    def put(self, record: StoredResponse) -> None:
        """Let callers find a response."""
        data = record.model_dump_json().encode()
        self._make()
        self.folder.replace(f"asked/{record.id}.json", data)
        self._count(1, len(data))

    def size(self, response_id: str) -> int:
        """Bytes that ``get`` would read; 0 if there is nothing."""
        return int(self.folder.info(f"asked/{response_id}.json").size or 0) if self._may_be(response_id) else 0

    def get(self, response_id: str) -> StoredResponse:
        """A response as it is now.

        Raises:
            NotFound: there is none, or it has expired, or is another project's.
        """
        data = self.folder.read_whole(f"asked/{response_id}.json") if self._may_be(response_id) else None
        if data is None:
            raise NotFound(f"response_id: there is no response {shown(response_id)}")
        record = StoredResponse.model_validate_json(data)
        if not is_own(record.caller):
            raise NotFound(f"response_id: there is no response {shown(response_id)}")
        ended = self.ended(response_id) if record.asked is not None else None
        return record if ended is None else record.model_copy(update={"response": ended.response})

    def _may_be(self, response_id: str) -> bool:
        return bool(RESPONSE_ID.fullmatch(response_id)) and made_at(response_id) > time.time() - self._keep_s

    def ended(self, response_id: str) -> EndedResponse | None:
        """How one in the background ended; None while it has not."""
        data = self.folder.read_whole(f"ended/{response_id}.json")
        return None if data is None else EndedResponse.model_validate_json(data)

    def delete(self, response_id: str) -> None:
        """Callers see it no more before the rest goes."""
        self.folder.delete([f"asked/{response_id}.json", f"ended/{response_id}.json"])
        self.close(response_id)

    # -- in the background --------------------------------------------------------------------------------

    def open(self, record: StoredResponse, holder: str) -> None:
        """Take in a response that ``holder`` answers in the background."""
        self._make()
        # The record last: without it, the marks harm nobody; without them, it would never end.
        self.claim(record.id, Claim(0, holder, 0))
        self.folder.create(f"open/{record.id}", b"")
        self.put(record)

    def open_ids(self) -> set[str]:
        """Those that are being answered in the background."""
        return {name for name in self.folder.names("open") if RESPONSE_ID.fullmatch(name)}

    def claim(self, response_id: str, claim: Claim) -> bool:
        """Take it over; of many at once, one does."""
        data = json.dumps({"holder": claim.holder, "deaths": claim.deaths}).encode()
        name = f"claims/{response_id}.{claim.number:04d}.json"
        # An object store may say False to the one whose answer was lost on the way.
        return self.folder.create(name, data) or (bool(claim.holder) and self.folder.read_whole(name) == data)

    def claims(self) -> dict[str, int]:
        """By response, the number of its last claim."""
        last: dict[str, int] = defaultdict(int)
        for name in self.folder.names("claims"):
            if leftover_of(name) is None:
                response_id, number, _ = name.split(".")
                last[response_id] = max(last[response_id], int(number))
        return last

    def claim_of(self, response_id: str, number: int) -> Claim | None:
        data = self.folder.read_json(f"claims/{response_id}.{number:04d}.json")
        return None if data is None else Claim(number, data["holder"], data["deaths"])

    def end(self, response_id: str, ended: EndedResponse) -> bool:
        """End it; False if it has ended already."""
        data = ended.model_dump_json().encode()
        name = f"ended/{response_id}.json"
        first = self.folder.create(name, data) or self.folder.read_whole(name) == data
        if first:
            self._count(0, len(data))
        self.close(response_id)
        return first

    def close(self, response_id: str) -> None:
        """Drop what is of use only while it is being answered."""
        pieces = [
            f"{folder}/{name}"
            for folder in ("claims", "events")
            for name in self.folder.names(folder)
            if name.startswith(response_id)
        ]
        self.folder.delete([*pieces, f"open/{response_id}"])

    def beat(self, holder: str, count: int) -> None:
        """Show that a process lives."""
        self._make()
        self.folder.replace(f"alive/{holder}.json", str(count).encode())

    def last_beat(self, holder: str) -> bytes | None:
        """What changes while the process lives; None if it has left, or was never there."""
        return self.folder.read_whole(f"alive/{holder}.json")

    def leave(self, holder: str) -> None:
        """The process answers nothing any more."""
        self.folder.delete([f"alive/{holder}.json"])

    def add_events(self, response_id: str, number: int, events: list[dict[str, Any]]) -> None:
        """The next piece of a stream of events."""
        self.folder.create(f"events/{response_id}.{number:06d}.json", json.dumps(events).encode())

    def events(self, response_id: str, number: int) -> list[dict[str, Any]] | None:
        """A piece of a stream of events; None if it is not there, or not yet."""
        data = self.folder.read_whole(f"events/{response_id}.{number:06d}.json")
        found: list[dict[str, Any]] | None = None if data is None else json.loads(data)
        return found

    def all_events(self, response_id: str) -> list[dict[str, Any]]:
        """All that is there by now."""
        found: list[dict[str, Any]] = []
        number = 0
        while (piece := self.events(response_id, number)) is not None:
            found += piece
            number += 1
        return found

    # -- upkeep -----------------------------------------------------------------------------------------

    @property
    def sweep_is_due(self) -> bool:
        """Whether this process has stored a good part of what may be kept since it last looked."""
        return self._stored * LOOK_EVERY >= self._most or self._stored_bytes * LOOK_EVERY >= self._most_bytes

    def sweep(self) -> None:
        """Delete what is too old and, the oldest first, what is too much; and what processes left that died."""
        with self._counting:
            self._stored = self._stored_bytes = 0
        sizes = self._sizes()
        count, total, oldest_s = len(sizes), sum(sizes.values()), time.time() - self._keep_s
        being_answered = self.open_ids()
        for response_id in sorted(sizes):
            expired = made_at(response_id) < oldest_s
            if not expired and count <= self._most and total <= self._most_bytes:
                break
            if expired or response_id not in being_answered:
                count, total = count - 1, total - sizes[response_id]
                self.folder.delete([f"asked/{response_id}.json"])
                del sizes[response_id]
        for folder, kept in (
            ("open", sizes), ("ended", sizes), ("claims", being_answered), ("events", being_answered), ("alive", ())
        ):  # fmt: skip
            self.folder.delete(
                f"{folder}/{info.base_name}"
                for info in self.folder.entries(folder)
                if info.base_name.partition(".")[0] not in kept
                and (info.mtime_ns or 0) / 1e9 < time.time() - ORPHANED_S
            )

    def _sizes(self) -> dict[str, int]:
        """Bytes of each response."""
        sizes: dict[str, int] = {}
        for folder in ("asked", "ended"):
            for info in self.folder.entries(folder):
                response_id = info.base_name.partition(".")[0]
                if RESPONSE_ID.fullmatch(response_id) and (folder == "asked" or response_id in sizes):
                    sizes[response_id] = sizes.get(response_id, 0) + int(info.size or 0)
        return sizes

    def _count(self, stored: int, size: int) -> None:
        with self._counting:
            self._stored += stored
            self._stored_bytes += size

    def _make(self) -> None:
        if not self._made:
            for folder in FOLDERS:
                self.folder.make(folder)
            self._made = True
