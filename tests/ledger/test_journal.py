"""A process's file: whole lines survive its writer, and nobody takes it while that lives."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from hycluster.ledger.entry import entries_in
from hycluster.ledger.journal import UsageJournal, files_in, read_open, taken
from tests.ledger.entries import entry

WRITER = """
import sys, time
from pathlib import Path
from hycluster.ledger.journal import UsageJournal
from tests.ledger.entries import entry
journal = UsageJournal(Path(sys.argv[1]))
for number in range(100):
    journal.append(entry(input_tokens=number).line())
print("written", flush=True)
time.sleep(600)
"""


def tokens(folder: Path) -> list[int]:
    return [each.input_tokens for _, entries in read_open(folder) for each in entries]


def test_what_was_written_survives_the_writer_who_alone_has_it_until_then(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    with writer, writer.stdout:
        assert writer.stdout.readline() == b"written\n"
        (file,) = files_in(tmp_path)
        with taken(file) as data:
            assert data is None
        assert tokens(tmp_path) == list(range(100))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    with taken(file) as data:
        assert data is not None
        assert len(list(entries_in(data))) == 100
        with taken(file) as again:
            assert again is None


def test_a_torn_last_line_is_none(tmp_path: Path) -> None:
    whole = entry().line()
    (tmp_path / "a.jsonl").write_bytes(whole + whole[: len(whole) // 2])
    assert len(tokens(tmp_path)) == 1


def test_a_line_of_another_version_is_not_passed_over() -> None:
    with pytest.raises(TypeError):
        list(entries_in(b'{"cost": "0", "what": 1}\n'))


def test_a_file_that_was_committed_meanwhile_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = UsageJournal(tmp_path)
    journal.append(entry().line())
    journal.close()
    (file,) = files_in(tmp_path)
    real = os.open

    def and_then(path: Any, *rest: Any) -> int:
        descriptor = real(path, *rest)
        Path(path).unlink()
        return descriptor

    monkeypatch.setattr(os, "open", and_then)
    with taken(file) as data:
        assert data is None
    monkeypatch.undo()
    with taken(file) as data:
        assert data is None


def test_nothing_is_lost_or_doubled_where_it_is_cut(tmp_path: Path) -> None:
    journal = UsageJournal(tmp_path)
    done = threading.Event()

    def cut() -> None:
        while not done.is_set():
            journal.cut()
            journal.sync()

    cutting = threading.Thread(target=cut)
    cutting.start()
    for number in range(3000):
        journal.append(entry(input_tokens=number).line())
    done.set()
    cutting.join()
    journal.close()
    assert sorted(tokens(tmp_path)) == list(range(3000))
    assert len(files_in(tmp_path)) > 1


def test_a_full_disk_loses_nothing_and_tears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = UsageJournal(tmp_path)
    real, room = os.write, [100, 0, None]

    def write(descriptor: int, data: bytes) -> int:
        left = room.pop(0) if len(room) > 1 else room[0]
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[:left])

    # Half a line, then none at all, then there is room again.
    monkeypatch.setattr(os, "write", write)
    journal.append(entry(input_tokens=1).line())
    journal.append(entry(input_tokens=2).line())
    assert journal.waiting == 2
    assert tokens(tmp_path) == []
    journal.retry()
    assert journal.waiting == 2
    journal.retry()
    journal.append(entry(input_tokens=3).line())
    assert journal.waiting == 0
    assert tokens(tmp_path) == [1, 2, 3]
    monkeypatch.undo()
    journal.close()
