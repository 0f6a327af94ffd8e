"""The command as a process."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hycluster import client
from hycluster.cli import app
from hycluster.errors import SettingsError
from hycluster.summarize import cli
from tests.command import Ran, run, run_anew
from tests.summarize.stand_in import SummarizingGenerator
from tests.waiting import PATIENCE_S

NOT_NEEDED = {"ray", "torch", "vllm", "transformers", "sqlalchemy"}


async def start(*arguments: str | Path) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hycluster", "summarize", *map(str, arguments), stdin=pipe, stdout=pipe, stderr=pipe
    )


async def command(*arguments: str | Path, text: str = "", how: Callable[..., Ran] = run) -> tuple[int | None, str, str]:
    """Exit code, standard output and standard error."""
    done, imported = await asyncio.to_thread(how, "summarize", *map(str, arguments), asked=text)
    assert not NOT_NEEDED & imported
    return done.returncode, done.stdout, done.stderr


async def test_files_in_text_on_output_and_errors_at_the_end(
    address: str, stand_in: SummarizingGenerator, tmp_path: Path
) -> None:
    (tmp_path / "a.md").write_text("A text.")
    (tmp_path / "b.txt").write_text("word " * 2000)
    out = tmp_path / "out.jsonl"
    code, said, errors = await command(
        *(tmp_path, tmp_path / "none", "-", "--address", address),
        *("--max-tokens", "2", "--output", out, "--keep-tree", "--priority", "batch"),
        text="From a pipe.",
    )
    assert code == 1
    assert said == "".join(f"==> {name} <==\nw0 w1\n\n" for name in (tmp_path / "a.md", tmp_path / "b.txt", "-"))
    assert errors.splitlines()[0] == f"error: {tmp_path / 'none'}: no such file"
    assert errors.splitlines()[1].startswith(f"3 of 4 files summarized in {len(stand_in.requests)} calls, ")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("parts") for line in lines] == [1, lines[1]["parts"], None, 1]
    assert lines[1]["parts"] > 1
    assert lines[1]["tree"]["nodes"][-1]["summary"] == "w0 w1 "


async def test_one_text_from_a_pipe_is_its_summary_alone(address: str) -> None:
    code, said, errors = await command(
        "-", "--address", address, "--max-tokens", "2", text="From a pipe.", how=run_anew
    )
    assert (code, said) == (0, "w0 w1\n")
    assert errors.startswith("1 of 1 files summarized in 1 calls, ")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "FILE"),
        (("a", "--part-tokens", "3"), "--part-tokens"),
        (("a", "--part-tokens", "100", "--overlap-tokens", "60"), "overlap_tokens: 60 is not allowed"),
        (("a", "--keep-tree"), "--keep-tree: needs --json or --output PATH"),
        (("a", "--output", "a"), "--output: a is one of the files to summarize"),
        (("a", "--priority", "high"), "--priority"),
    ],
)
def test_wrong_use_exits_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["summarize", *arguments])
    refusal = result.exception
    assert (refusal.exit_code if isinstance(refusal, SettingsError) else result.exit_code) == 2
    assert says in result.stderr + str(refusal)


async def test_no_cluster_is_one_line(tmp_path: Path) -> None:
    code, said, errors = await command("-", "--address", "127.0.0.1:1", text="text")
    assert (code, said) == (1, "")
    (line,) = errors.splitlines()
    assert line.startswith("error: --address: no hycluster answers at 127.0.0.1:1; start one")


async def test_ctrl_c_stops_and_cancels_the_calls(address: str, stand_in: SummarizingGenerator, tmp_path: Path) -> None:
    stand_in.pause_s = 600
    (tmp_path / "a.txt").write_text("word " * 20_000)
    process = await start(tmp_path, "--address", address)
    async with asyncio.timeout(2 * PATIENCE_S):
        await stand_in.until_busy()
        process.send_signal(signal.SIGINT)
        _, errors = await process.communicate()
    assert process.returncode == 130
    assert errors.decode().splitlines() == ["stopped"]
    await stand_in.until_idle()


def test_the_default_address_is_the_clients() -> None:
    assert cli.ADDRESS == client.DEFAULT_TARGET
