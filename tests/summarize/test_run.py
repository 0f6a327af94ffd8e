"""Files through a real gRPC ingress."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hycluster.batch import ask
from hycluster.batch.job import Summary
from hycluster.core import Priority, Sampling
from hycluster.errors import InvalidInput, JobFailed, SettingsError, Unavailable, UnknownModel
from hycluster.summarize.output import Summarized
from hycluster.summarize.progress import SummaryProgress
from hycluster.summarize.run import SummaryOptions, summarize_files
from tests.ingress.stand_in import MODEL
from tests.summarize.stand_in import SummarizingGenerator

LONG = "".join(f"w{n}" + (".\n\n" if n % 40 == 0 else " ") for n in range(2000))


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "FIRST_BACKOFF_S", 0.001)


def wish(**changes: Any) -> SummaryOptions:
    settings = {name: changes.pop(name) for name in ("part_tokens", "overlap_tokens") if name in changes}
    usual: dict[str, Any] = {
        "model": None,
        "sampling": Sampling(max_tokens=5, temperature=0),
        "settings": Summary(**settings),
        "priority": Priority.ONLINE,
        "calls_at_once": 8,
        "together": False,
        "retry_s": 10,
    }
    return SummaryOptions(**usual | changes)


async def summarized(
    address: str, *files: Path | str, progress: SummaryProgress | None = None, **changes: Any
) -> list[Any]:
    made: list[Summarized] = []
    progress = progress or SummaryProgress(len(files))
    await summarize_files([str(file) for file in files], wish(**changes), address, progress, made.append)
    return made


@pytest.fixture
def long(tmp_path: Path) -> Path:
    path = tmp_path / "long.txt"
    path.write_text(LONG)
    return path


async def test_a_short_text_is_one_call(address: str, stand_in: SummarizingGenerator, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A short {text}.")
    (made,) = await summarized(address, path)
    assert (made.files, made.model, made.characters, made.error) == ((str(path),), MODEL, 15, None)
    assert (made.tree.root.summary, made.parts, made.tree.root.level) == ("w0 w1 w2 w3 w4 ", 1, 0)
    ((request, deadline),) = stand_in.requests
    assert stand_in.prompts[0].endswith("Text:\nA short {text}.")
    assert (request.priority, request.sampling, deadline) == (Priority.ONLINE, wish().sampling, None)


async def test_a_long_text_is_covered_by_its_parts(address: str, stand_in: SummarizingGenerator, long: Path) -> None:
    progress = SummaryProgress(1)
    (made,) = await summarized(address, long, progress=progress, priority=Priority.BATCH, part_tokens=100)
    parts = [node for node in made.tree.nodes if node.level == 0]
    assert made.parts == len(parts) >= 20
    assert (parts[0].start, parts[-1].end, made.characters) == (0, len(LONG), len(LONG))
    assert all(a.end == b.start for a, b in pairwise(parts))
    assert made.tree.root.level >= 1
    assert {request.priority for request, _ in stand_in.requests} == {Priority.BATCH}
    assert len({request.request_id for request, _ in stand_in.requests}) == len(made.tree.nodes)
    assert 1 < stand_in.most_running <= 8
    assert progress.answered == progress.expected == len(made.tree.nodes)
    assert progress.tokens == made.tree.prompt_tokens + made.tree.completion_tokens


async def test_a_failed_part_is_asked_again_alone(address: str, stand_in: SummarizingGenerator, long: Path) -> None:
    stand_in.fail_once = {"0.3": Unavailable("a replica was lost"), "1.0": Unavailable("a replica was lost")}
    (made,) = await summarized(address, long)
    assert made.error is None
    assert len(stand_in.requests) == len(made.tree.nodes) + 2


async def test_one_bad_file_does_not_stop_the_others(
    address: str, stand_in: SummarizingGenerator, long: Path, tmp_path: Path
) -> None:
    files = [tmp_path / f"{n}.txt" for n in range(50)]
    for n, path in enumerate(files):
        path.write_text(f"refuse {n}" if n == 7 else f"Text {n}.")
    files[3].write_bytes(b"\xff")
    files[4].unlink()
    progress = SummaryProgress(51)
    made = await summarized(address, *files[:20], long, *files[20:], progress=progress)
    assert [document.files for document in made] == [(str(path),) for path in (*files[:20], long, *files[20:])]
    failures = {place: document.error for place, document in enumerate(made) if document.error}
    assert failures == {
        3: "is not text in UTF-8: byte 0xff at offset 0; convert it, as by iconv",
        4: "no such file",
        7: "prompt: refused by the stand-in",
    }
    assert all((document.tree is None) == (place in failures) for place, document in enumerate(made))
    assert progress.finished == 51
    assert 1 < stand_in.most_running <= 8


async def test_together(address: str, stand_in: SummarizingGenerator, long: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A short text.")
    failed, made = await summarized(address, tmp_path / "none.txt", short, long, together=True)
    assert failed.error == "no such file"
    assert made.files == (str(short), str(long))
    assert f"# {short}\n\nA short text.\n\n# {long}\n\nw0." in "".join(stand_in.prompts)
    assert made.characters > len(LONG)
    assert made.tree.root.level >= 1
    (*_, nothing) = await summarized(address, tmp_path / "none.txt", together=True)
    assert nothing.error == "none of the files can be read"


@pytest.mark.parametrize(
    ("names", "model", "error", "says"),
    [
        (["a", "b"], None, SettingsError, "--model: must be one of 'a', 'b'"),
        ([], None, SettingsError, "--model: no model is served"),
        (["a", "b"], "c", UnknownModel, "model: 'c' is not served here; served are 'a', 'b'"),
    ],
)
async def test_which_model(
    address: str, stand_in: SummarizingGenerator, long: Path, names: list[str], model: Any, error: Any, says: str
) -> None:
    stand_in.names = names
    with pytest.raises(error, match=says):
        await summarized(address, long, model=model)


async def test_parts_too_large_for_the_context_are_a_wrong_setting(address: str, long: Path) -> None:
    with pytest.raises(SettingsError, match=r"summary\.part_tokens: 5000 is not allowed; must be at most [0-9]+ in"):
        await summarized(address, long, part_tokens=5000)


async def test_no_cluster(long: Path) -> None:
    with pytest.raises(Unavailable, match=r"--address: no hycluster answers at 127\.0\.0\.1:1; start one with"):
        await summarized("127.0.0.1:1", long)


async def test_engines_that_stay_away_end_it(address: str, stand_in: SummarizingGenerator, long: Path) -> None:
    stand_in.fail_once = {"0.3": Unavailable("no replica")}
    with pytest.raises(JobFailed, match="no engine could serve it for 0 s: no replica"):
        await summarized(address, long, retry_s=0)
    await stand_in.until_idle()


async def test_a_refused_part_is_its_documents_end(
    address: str, stand_in: SummarizingGenerator, long: Path, tmp_path: Path
) -> None:
    stand_in.fail_once = {"0.3": InvalidInput("prompt: odd")}
    other = tmp_path / "other.txt"
    other.write_text("text")
    made = await summarized(address, long, other)
    assert [document.error for document in made] == ["prompt: odd", None]


async def test_cancelling_cancels_the_calls(address: str, stand_in: SummarizingGenerator, long: Path) -> None:
    stand_in.pause_s = 600
    running = asyncio.create_task(summarized(address, long))
    await stand_in.until_busy()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await stand_in.until_idle()
