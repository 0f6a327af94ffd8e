"""``hycluster summarize`` against the cluster: real engines, real tokenizers, the gRPC ingress."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hycluster.batch.prompts import PRESETS
from hycluster.client import Client
from tests.integration.conftest import MODEL, TINY, Served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SHORT = "The Danube flows through ten countries, more than any other river. It ends in the Black Sea."


def summarize(served: Served, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hycluster", "summarize", "--address", served.grpc, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def text_of(words: int) -> str:
    chance = random.Random(words)
    ends = chance.choices([" ", ". ", ".\n\n"], [8, 1, 1], k=words)
    return "".join(f"w{chance.randrange(100)}{end}" for end in ends)


def test_long_and_short_files_become_a_summary_each(served: Served, tmp_path: Path) -> None:
    texts = {"bad.txt": "", "long.md": text_of(5000), "longer.txt": text_of(8000), "short.txt": SHORT}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    out = tmp_path / "out.jsonl"
    done = summarize(served, tmp_path, "--model", TINY, "--max-tokens", "48", "--keep-tree", "--output", out)
    assert done.returncode == 1
    assert f"error: {tmp_path / 'bad.txt'}: is empty" in done.stderr
    assert "3 of 4 files summarized" in done.stderr
    lines: dict[str, dict[str, Any]] = {
        Path(line["file"]).name: line for line in map(json.loads, out.read_text().splitlines())
    }
    assert list(lines) == sorted(texts)
    for name in ("long.md", "longer.txt"):
        nodes = lines[name]["tree"]["nodes"]
        parts = [node for node in nodes if node["level"] == 0]
        assert lines[name]["parts"] == len(parts) > 5
        assert (parts[0]["start"], parts[-1]["end"]) == (0, len(texts[name]))
        assert all(a["end"] == b["start"] for a, b in pairwise(parts))
        # A random model never ends by itself: the longest summaries that there can be.
        assert {node["finish_reason"] for node in nodes} == {"length"}
        assert nodes[-1]["completion_tokens"] == 48
        assert nodes[-1]["level"] == lines[name]["merge_levels"] >= 1
    assert lines["short.txt"]["parts"] == 1


def test_a_short_text_gets_the_models_own_answer(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(SHORT)
    done = summarize(served, path, "--model", MODEL, "--max-tokens", "24")
    messages = [{"role": "user", "content": PRESETS["summarize"].format(text=SHORT)}]
    with Client(served.grpc) as client:
        answer = client.generate(MODEL, messages=messages, max_tokens=24, temperature=0)
    assert done.returncode == 0
    assert done.stdout == answer.outputs[0].text.strip() + "\n"


def test_the_model_must_be_named_where_several_are_served(served: Served) -> None:
    done = summarize(served, "-")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --model: must be one of ")
    assert repr(TINY) in line
