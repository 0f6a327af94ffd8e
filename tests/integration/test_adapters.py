"""LoRA adapters through both ingresses and a batch job: token for token what ``vllm.LLM`` gives with the same
adapter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hycluster.client import AsyncClient, Client
from hycluster.core import Sampling
from hycluster.errors import UnknownModel
from tests.integration.conftest import gather_bounded
from tests.integration.featured import HIDDEN, LAYERS, MAX_CPU_LORAS, TINY, Featured
from tests.lora_adapters import attention_of, write_adapter
from tests.vllm_forks import VllmForks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = ["The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at"]
MAX_TOKENS = 12
GREEDY = Sampling(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
NAMES = (TINY, "a", "b")

Reference = dict[str, dict[str, list[Any]]]


@pytest.fixture(scope="module")
def expected(
    featured: Featured, vllm_forks: VllmForks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    out = tmp_path_factory.mktemp("reference") / "ids.json"
    asked = {
        "model": str(tiny_model),
        "base": TINY,
        "adapters": {name: str(path) for name, path in featured.adapters.items()},
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
    }
    vllm_forks.run(
        Path(__file__).with_name("reference_adapters.py"),
        str(out),
        asked=json.dumps(asked),
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"},
        timeout_s=240,
    )
    reference: Reference = json.loads(out.read_text())
    # Otherwise the tests below could not tell an adapter from its absence.
    assert len({json.dumps(answers["ids"]) for answers in reference.values()}) == len(reference)
    return reference


def post(featured: Featured, path: str, **body: Any) -> httpx.Response:
    # A connection each, so that either ingress may get it.
    return httpx.post(f"{featured.served.http}{path}", json=body, timeout=120)


def complete(featured: Featured, model: str) -> list[list[int]]:
    asked = {"prompt": PROMPTS, "temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    answer = post(featured, "/v1/completions", model=model, return_token_ids=True, **asked).raise_for_status().json()
    assert answer["model"] == model
    return [choice["token_ids"] for choice in answer["choices"]]


@pytest.mark.parametrize("name", NAMES)
def test_http(featured: Featured, expected: Reference, name: str) -> None:
    assert complete(featured, name) == expected[name]["ids"]


async def test_grpc_with_all_of_them_in_one_batch(featured: Featured, expected: Reference) -> None:
    async with AsyncClient(featured.served.grpc) as client:

        async def ask(name: str, prompt: str) -> list[int]:
            # One session: one replica, which gets the base model and both adapters at once.
            answer = await client.generate(model=name, prompt=prompt, sampling=GREEDY, session_id="one")
            return answer.outputs[0].token_ids

        pairs = [(name, number) for number in range(len(PROMPTS)) for name in NAMES]
        got = await gather_bounded([ask(name, PROMPTS[number]) for name, number in pairs])
    assert got == [expected[name]["ids"][number] for name, number in pairs]


def test_grpc_stream(featured: Featured, expected: Reference) -> None:
    with Client(featured.served.grpc) as client:
        chunks = list(client.stream(model="b", prompt=PROMPTS[0], sampling=GREEDY))
    got = [token for chunk in chunks for output in chunk.outputs for token in output.token_ids]
    assert got == expected["b"]["ids"][0]


def test_batch(featured: Featured, expected: Reference, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": PROMPTS}), tmp_path / "in.parquet")
    job = tmp_path / "job.yaml"
    job.write_text(
        "name: adapted\nmodel: a\ntask: generate\nprompt: '{text}'\n"
        f"sampling: {{temperature: 0, max_tokens: {MAX_TOKENS}}}\n"
    )
    command = [sys.executable, "-m", "hycluster", "batch", "run", str(job), "--input", str(tmp_path / "in.parquet")]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **featured.environment},
    )
    assert done.returncode == 0, done.stderr
    (part,) = (tmp_path / "out").glob("part-*.parquet")
    assert pq.read_table(part)["output"].to_pylist() == expected["a"]["chats"]


def test_both_ingresses_list_them(featured: Featured) -> None:
    listed = httpx.get(f"{featured.served.http}/v1/models").json()["data"]
    assert {model["id"]: model.get("parent") for model in listed if model["id"] in NAMES} == {
        TINY: None,
        "a": TINY,
        "b": TINY,
    }
    with Client(featured.served.grpc) as client:
        assert {card.name for card in client.list_models()} >= set(NAMES)


class TestAtRunTime:
    # Enough new connections for each of the two ingress processes to have had one, but for one time in 2000.
    TRIES = 12

    def load(self, featured: Featured, name: str, path: Path | str, **more: Any) -> httpx.Response:
        return post(featured, "/v1/load_lora_adapter", lora_name=name, lora_path=str(path), **more)

    def unload(self, featured: Featured, name: str) -> httpx.Response:
        return post(featured, "/v1/unload_lora_adapter", lora_name=name)

    def test_load_use_and_unload_at_every_ingress_process(self, featured: Featured, expected: Reference) -> None:
        assert post(featured, "/v1/completions", model="c", prompt="x").status_code == 404
        self.load(featured, "c", featured.adapters["c"], model=TINY).raise_for_status()
        assert all(complete(featured, "c") == expected["c"]["ids"] for _ in range(self.TRIES))
        with Client(featured.served.grpc) as client:
            got = client.generate(model="c", prompt=PROMPTS[0], sampling=GREEDY)
        assert got.outputs[0].token_ids == expected["c"]["ids"][0]

        self.unload(featured, "c").raise_for_status()
        for _ in range(self.TRIES):
            assert post(featured, "/v1/completions", model="c", prompt="x").status_code == 404
        with Client(featured.served.grpc) as client, pytest.raises(UnknownModel, match="'c' is not served here"):
            client.generate(model="c", prompt=PROMPTS[0], sampling=GREEDY)
        assert complete(featured, TINY) == expected[TINY]["ids"]

    def test_a_name_goes_over_to_another_source(self, featured: Featured, expected: Reference) -> None:
        self.load(featured, "d", featured.adapters["a"]).raise_for_status()
        assert complete(featured, "d") == expected["a"]["ids"]
        self.load(featured, "d", featured.adapters["c"], load_inplace=True).raise_for_status()
        assert all(complete(featured, "d") == expected["c"]["ids"] for _ in range(self.TRIES))
        refused = self.load(featured, "d", featured.adapters["c"], load_inplace=True)
        assert refused.status_code == 400
        assert "changed weights need a path of their own" in refused.json()["error"]["message"]
        self.unload(featured, "d").raise_for_status()

    def test_what_is_wrong_is_said_and_never_listed(self, featured: Featured, tmp_path: Path) -> None:
        broken = shutil.copytree(featured.adapters["c"], tmp_path / "broken")
        (broken / "adapter_model.safetensors").write_bytes(b"no weights")
        wide = write_adapter(tmp_path / "wide", attention_of(LAYERS, HIDDEN), seed=9, rank=16)
        misfit = write_adapter(tmp_path / "misfit", attention_of(LAYERS, HIDDEN + 2), seed=9)
        before = httpx.get(f"{featured.served.http}/v1/models").json()["data"]
        for name, path, why in (
            ("x", broken, "can't be loaded"),
            ("x", wide, "LoRA rank 16 is greater than max_lora_rank 8"),
            ("x", misfit, "can't be loaded"),
            ("x", tmp_path / "nothing", "No adapter found"),
            ("x", "", "lora_path: must not be empty"),
            ("a", featured.adapters["c"], "lora_name: 'a' is an adapter of 'tiny' already"),
            (TINY, featured.adapters["c"], "lora_name: 'tiny' is the name of a model"),
            ("a b", featured.adapters["c"], "lora_name: 'a b' is not allowed"),
        ):
            answer = self.load(featured, name, path)
            assert answer.status_code == 400, (name, path)
            assert why in answer.json()["error"]["message"], (name, path)
        answer = self.load(featured, "x", featured.adapters["c"], model="ngram")
        assert "'ngram' takes no adapters" in answer.json()["error"]["message"]
        assert self.unload(featured, "x").status_code == 404
        after = httpx.get(f"{featured.served.http}/v1/models").json()["data"]
        assert [model["id"] for model in after] == [model["id"] for model in before]

    def test_an_adapter_whose_files_are_gone_fails_its_requests_and_not_the_engine(
        self, featured: Featured, expected: Reference, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(featured.adapters["c"], tmp_path / "gone")
        self.load(featured, "gone", folder).raise_for_status()
        others = [f"other-{number}" for number in range(MAX_CPU_LORAS)]
        for name in others:
            # They push the first one out of the engines, which would read its files again.
            self.load(featured, name, featured.adapters["c"]).raise_for_status()
        shutil.rmtree(folder)
        for session in range(6):
            answer = post(featured, "/v1/completions", model="gone", prompt="x", session_id=str(session))
            assert answer.status_code == 503
        for name in ("gone", *others):
            self.unload(featured, name).raise_for_status()
        with Client(featured.served.grpc) as client:
            assert {card.name: card.ready_replicas for card in client.list_models()}[TINY] == 2
        assert all(complete(featured, name) == expected[name]["ids"] for name in NAMES)
