from __future__ import annotations

import errno
import io
import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.lease import Lease
from hycluster.batch.output.record import Totals
from hycluster.batch.progress.progress_file import Teller, tell_end
from hycluster.batch.progress.status import Status, Watcher, _Recent, recent_rates, show_status
from hycluster.batch.progress.terminal import RunProgress
from hycluster.errors import SettingsError
from hycluster.storage.disk import DiskFolder
from tests.batch.committed import commit_all
from tests.batch.conftest import MakeJob, write_texts
from tests.located import at


def test_a_job_on_its_way(make_job: MakeJob, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(corpus / "a" / "a.parquet", [None, "two words"])
    job = make_job()
    out = commit_all(job, first=0, finish=False)
    watcher = Watcher(at(out))
    status = watcher.look()
    assert (status.finished, status.rows, status.shards, status.shards_done) == (False, 14, 8, 0)
    assert (status.rows_per_s, status.tokens_per_s, status.eta_s, status.committed_at) == (None, None, None, None)
    assert status.line().startswith("state nothing committed yet, shards 0/8, rows 0/14, ")

    commit_all(job, first=3, finish=False)
    status = watcher.look()
    assert (status.shards_done, status.done) == (3, Totals(6, 1, 15, 10))
    assert status.rows_per_s is not None
    assert status.eta_s == pytest.approx(8 / status.rows_per_s)
    assert "state not finished, last commit 0:00:" in status.line()
    assert "shards 3/8, rows 6/14, quarantined 1" in status.line()

    read: list[int] = []
    whole = OutputFolder.record

    def counted(self: OutputFolder, shard: int) -> object:
        read.append(shard)
        return whole(self, shard)

    monkeypatch.setattr(OutputFolder, "record", counted)
    commit_all(job, first=4, finish=False)
    read.clear()
    assert watcher.look().shards_done == 4
    assert read == [3], "what was read is not read again"
    commit_all(job)
    status = watcher.look()
    assert (status.finished, status.shards_done, status.done.rows, status.eta_s) == (True, 8, 14, None)
    assert status.line().startswith("state finished, shards 8/8, rows 14/14, quarantined 1, ")


def test_what_the_job_said_last(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    out = commit_all(make_job(), first=2, finish=False)
    edition = OutputFolder(at(out)).edition()
    progress = RunProgress(Totals(5, 1, 0, 0), 3, 2, {"Poison": 1})
    teller = Teller(at(out), edition, earlier_rows=4)
    teller.tell(progress)
    teller.tell(RunProgress())
    status = Watcher(at(out)).look()
    assert status.word is not None
    assert status.word.progress == progress, "a word within seconds of the last is not written"
    assert (status.rows_through, status.done.rows) == (9, 4)
    assert (
        "rows 9/12, of these committed 4, in flight 3, retries 2, quarantined 1 (this run: Poison 1)," in status.line()
    )
    assert status.line().startswith("state running, last commit ")
    assert json.loads(json.dumps(status.to_dict()))["word"]["progress"]["retries"] == 2

    later = time.time() + 3600
    monkeypatch.setattr("hycluster.batch.progress.status.time", SimpleNamespace(time=lambda: later))
    stopped = r"state stopped, last heard of 1:0\d:\d\d ago; its own command resumes it"
    assert re.search(stopped, Watcher(at(out)).look().line())

    tell_end(at(out).writable(), edition, "too much was lost")
    line = Watcher(at(out)).look().line()
    assert "state ended: too much was lost, shards" in line
    assert line.endswith("ETA -")
    assert "retries 2" in line
    assert "in flight" not in line
    for unbelievable in (json.dumps({"edition": "another"}), "{", json.dumps({"edition": edition, "progress": 1})):
        (out / "_progress.json").write_text(unbelievable)
        assert Watcher(at(out)).look().word is None
    teller.end()
    assert not (out / "_progress.json").exists()


def test_a_job_that_is_stopped_says_how_far_it_was(make_job: MakeJob) -> None:
    out = commit_all(make_job(), first=2, finish=False)
    edition = OutputFolder(at(out)).edition()

    def run() -> None:
        with Teller(at(out), edition, earlier_rows=0) as teller:
            for rows in (4, 5, 9):
                teller.tell(RunProgress(Totals(rows)))
            assert Watcher(at(out)).look().rows_through == 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    tell_end(at(out), edition, "stopped")
    assert Watcher(at(out)).look().rows_through == 9


def test_a_job_that_the_engines_have_no_time_for_says_so(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    out = commit_all(make_job(), first=2, finish=False)
    edition = OutputFolder(at(out)).edition()
    Teller(at(out), edition, 0).tell(RunProgress(Totals(5, 0, 0, 0), in_flight=3, parked=3))
    status = Watcher(at(out)).look()
    assert "state running, waiting: online traffic, last commit " in status.line()
    assert json.loads(json.dumps(status.to_dict()))["waiting"] == "online traffic"
    # One that has stopped waits for nobody.
    later = time.time() + 3600
    monkeypatch.setattr("hycluster.batch.progress.status.time", SimpleNamespace(time=lambda: later))
    status = Watcher(at(out)).look()
    assert "waiting" not in status.line()
    assert status.to_dict()["waiting"] is None
    # What an earlier version wrote.
    word = json.loads((out / "_progress.json").read_text())
    del word["progress"]["parked"]
    (out / "_progress.json").write_text(json.dumps(word))
    assert Watcher(at(out)).look().word is not None


def test_a_store_that_takes_no_word_does_not_end_the_job(make_job: MakeJob) -> None:
    out = commit_all(make_job(), first=1, finish=False)
    shutil.rmtree(out)
    Teller(at(out), "e", 0).tell(RunProgress())
    assert not out.exists()


def test_a_job_that_was_killed_on_this_machine_does_not_run(make_job: MakeJob) -> None:
    """Until it had been silent for a minute it was said to run."""
    folder = at(commit_all(make_job(), first=1, finish=False))
    Teller(folder, OutputFolder(folder).edition(), 0).tell(RunProgress(in_flight=3))
    with Lease(folder) as lease:
        lease.take()
        assert Watcher(folder).look().line().startswith("state running, last commit ")
        held = folder.read_json("_coordinator/00000001.json")
        assert held is not None
        for changed, dead in (({"started": "long ago"}, True), ({"started": "long ago", "machine": "another"}, False)):
            folder.replace("_coordinator/00000002.json", json.dumps({**held, **changed}).encode())
            status = Watcher(folder).look()
            assert status.over == dead
            assert status.line().startswith("state ended: stopped; its own command resumes it, ") == dead


def test_a_full_disk_does_not_leave_it_running(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last word was that it runs, for a minute more."""
    folder = at(commit_all(make_job(), first=1, finish=False))
    edition = OutputFolder(folder).edition()
    Teller(folder, edition, 0).tell(RunProgress(in_flight=3))
    replace = DiskFolder.replace

    def full(self: DiskFolder, path: str, data: bytes) -> None:
        if self.exists(path):
            raise OSError(errno.ENOSPC, "No space left on device", path)
        replace(self, path, data)

    monkeypatch.setattr(DiskFolder, "replace", full)
    tell_end(folder, edition, "no space left")
    assert "state ended: no space left" in Watcher(folder).look().line()


def test_another_job_in_the_same_folder_is_counted_anew(make_job: MakeJob) -> None:
    out = commit_all(make_job())
    watcher = Watcher(at(out))
    assert watcher.look().shards_done == 7
    shutil.rmtree(out)
    commit_all(make_job(), first=2, finish=False)
    assert (watcher.look().shards_done, watcher.look().done.rows) == (2, 4)


def test_rates_are_those_of_the_last_commits() -> None:
    assert recent_rates([]) is None
    assert recent_rates([_Recent(100.0, 90.0, 20, 50)]) == (2.0, 5.0)
    assert recent_rates([_Recent(100.0, 100.0, 20, 50)]) is None
    # The first one's rows were made before the time that is looked at.
    assert recent_rates([_Recent(110.0, 95.0, 20, 50), _Recent(100.0, 90.0, 7, 7)]) == (2.0, 5.0)
    yesterday = _Recent(100.0 - 86400, 90.0 - 86400, 1000, 1000)
    assert recent_rates([yesterday, _Recent(100.0, 90.0, 20, 50)]) == (2.0, 5.0)


def shown(out: Path, *, terminal: bool = False, follow: bool = False, as_json: bool = False) -> str:
    text = io.StringIO()
    show_status(at(out), follow=follow, as_json=as_json, console=Console(file=text, force_terminal=terminal, width=300))
    return text.getvalue()


def test_a_line_a_table_and_json(make_job: MakeJob) -> None:
    out = commit_all(make_job())
    assert shown(out).count("\n") == 1
    data = json.loads(shown(out, as_json=True))
    assert (data["finished"], data["shards_done"], data["done"]["completion_tokens"]) == (True, 7, 24)
    table = shown(out, terminal=True)
    assert "7/7" in table
    assert "│" in table


@pytest.mark.parametrize("terminal", [True, False])
def test_follow_ends_with_the_job(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    out = commit_all(make_job(), first=2, finish=False)
    monkeypatch.setattr("hycluster.batch.progress.status.time.sleep", lambda seconds: commit_all(make_job()))
    text = shown(out, terminal=terminal, follow=True)
    assert text.index("2/7") < text.index("7/7")


@pytest.mark.parametrize("terminal", [True, False])
def test_follow_ends_with_a_job_that_has_ended(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    out = commit_all(make_job(), first=2, finish=False)
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        assert not looks, "it has ended"
        looks.append(seconds)
        tell_end(at(out), OutputFolder(at(out)).edition(), "stopped; its own command resumes it")

    monkeypatch.setattr("hycluster.batch.progress.status.time.sleep", sleep)
    assert "stopped; its own command" in " ".join(shown(out, terminal=terminal, follow=True).split())


def test_where_no_job_is(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^OUTPUT: '.*' holds no output of a job"):
        Watcher(at(tmp_path)).look()
    (tmp_path / "_job.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"^OUTPUT: .*_job.json can't be read"):
        Watcher(at(tmp_path)).look()


def test_status_is_plain_data() -> None:
    status = Status("o", False, 10, None, 1, Totals(5), 2.0, 4.0, 2.5, 0.0)
    assert json.loads(json.dumps(status.to_dict()))["done"]["rows"] == 5
    assert "shards 1/?" in status.line()
    assert status.line().endswith("rows/s 2.0, tokens/s 4.0, ETA 0:00:02")
