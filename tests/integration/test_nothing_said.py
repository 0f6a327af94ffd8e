"""No log file and no metric of a service has prompts or keys, whatever callers send by HTTP, gRPC and in batches."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import psutil
import pytest

from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.ingress.proto import inference_pb2_grpc
from tests.families import words_below
from tests.integration.conftest import SIMULATED, Served, eventually, launch, stop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Sent as prompts, parts of prompts, and in their places.
CANARY = "canary4f1d"
DEEP = "[" * 3000
BODIES: dict[str, list[Any]] = {
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": CANARY}]},
        {"messages": [{"role": "user", "content": CANARY}], "stream": True},
        {"messages": CANARY},
        {"messages": [CANARY]},
        {"messages": [{"role": CANARY, "content": CANARY}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": {"a": CANARY}}]}]},
        {"messages": [{"role": "user", "content": [{"type": CANARY, "text": CANARY}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:{CANARY}"}}]}]},
        {"messages": [{"role": "tool", "content": CANARY}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": CANARY, "arguments": CANARY}}]}]},
        {"messages": [{"role": "user", "content": CANARY}], "tools": [{"type": "function", "function": CANARY}]},
        {"messages": [{"role": "user", "content": CANARY}], "tool_choice": {"function": {"name": CANARY}}},
        {"messages": [{"role": "user", "content": CANARY}], "chat_template": f"{{{{ {CANARY}.a.b }}}}"},
        {"messages": [{"role": "user", "content": f"{CANARY}\ud800"}]},
        {"messages": [{"role": "user", "content": CANARY * 9000}]},
        {
            "messages": [{"role": "user", "content": CANARY}],
            "response_format": {"type": "json_schema", "json_schema": {"name": CANARY, "schema": {"type": CANARY}}},
        },
    ],
    "/v1/completions": [
        {"prompt": CANARY},
        {"prompt": [CANARY, CANARY], "n": 2},
        {"prompt": {CANARY: 1}},
        {"prompt": [CANARY, 1]},
        {"prompt": CANARY, "stop": {CANARY: CANARY}},
        {"prompt": CANARY, "logit_bias": {CANARY: 1}},
        {"prompt": CANARY, "structured_outputs": {"regex": f"({CANARY}"}},
        {"prompt": CANARY, "structured_outputs": {"grammar": f"root ::= {CANARY}"}},
        {"prompt": CANARY, "max_tokens": CANARY},
        {"prompt": CANARY, "suffix": CANARY, "echo": True, "stream": True},
        {"prompt_embeds": CANARY},
        {"prompt": CANARY, "cache_salt": f"{CANARY}\ud800"},
        f'{{"prompt": "{CANARY}',
        f'{{"prompt": {DEEP}"{CANARY}"',
    ],
    "/v1/responses": [
        {"input": CANARY, "store": True},
        {"input": CANARY, "background": True},
        {"input": [{"role": CANARY, "content": [CANARY]}]},
        {"input": [{"type": CANARY, "text": CANARY}]},
        {"input": CANARY, "instructions": {CANARY: CANARY}},
        {"input": CANARY, "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": CANARY}}}},
    ],
    "/v1/messages": [
        {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 4},
        {"messages": [{"role": "user", "content": [{"type": CANARY, "text": CANARY}]}], "max_tokens": 4},
        {"messages": [{"role": "user", "content": CANARY}], "system": {CANARY: CANARY}, "max_tokens": 4},
        {"messages": [{"role": "user", "content": CANARY}], "tools": [{"name": CANARY, "input_schema": CANARY}]},
    ],
    "/v1/embeddings": [{"input": CANARY}],
    "/tokenize": [{"prompt": CANARY}, {"messages": [{"role": "user", "content": {CANARY: CANARY}}]}],
    "/v1/files": [{"purpose": CANARY}],
    "/v1/batches": [{"input_file_id": CANARY, "metadata": {"a": CANARY}}],
}  # fmt: skip
LINES = [
    *({"custom_id": f"c{n}", "method": "POST", "url": "/v1/completions", "body": {"model": SIMULATED, **body}}
      for n, body in enumerate(BODIES["/v1/completions"][:12])),
]  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """Attributes: key: of a caller, ``admin`` of an administrator, ``revoked`` of nobody any more."""

    served: Served
    folder: Path
    key: str
    admin: str
    revoked: str

    @property
    def secrets(self) -> list[str]:
        # Parts too, as of one that was cut.
        return [CANARY, *(part for key in (self.key, self.admin, self.revoked) for part in (key[4:24], key[24:48]))]


@pytest.fixture(scope="module")
def kept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    folder = tmp_path_factory.mktemp("said")
    settings = {
        "models": [
            {
                "name": SIMULATED,
                "source": str(tiny_model),
                "simulated": {"max_model_len": 2048, "vocab_size": 256},
                "engine": {"max_model_len": 2048},
                "hardware": {"cpus": 0.05},
            },
        ],
        "http": {"port": 0},
        "grpc": {"port": 0},
        "data_plane": {"host": "127.0.0.1"},
        "auth": {"enabled": True},
        "logs": {"level": "info", "requests": True},
        "batches": {"store": str(folder / "batches"), "poll_s": 0.2},
        "drain_timeout_s": 5,
    }
    path = folder / "settings.yaml"
    path.write_text(json.dumps(settings))
    env = {"HYCLUSTER_HOME": str(folder / "home")}
    server = launch([str(path)], folder / "serve.log", env)

    def key(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "hycluster", "keys", *arguments]
        said = subprocess.run(command, env={**os.environ, **env}, check=True, capture_output=True, text=True).stdout
        return json.loads(said) if said else {}

    try:
        keys = [key("create", "--project", "p", "--json", *scopes) for scopes in (("--scope", "batch"), (), ())]
        admin = key("create", "--project", "ops", "--scope", "admin", "--json")
        key("revoke", keys[1]["id"], "--yes")
        yield Kept(server, folder, keys[0]["key"], admin["key"], keys[1]["key"])
    finally:
        if server.process.poll() is None:
            stop(server.process)


async def by_http(kept: Kept) -> list[int]:
    statuses = []
    async with httpx.AsyncClient(base_url=kept.served.http, timeout=60) as http:

        async def ask(path: str, body: Any, key: str = kept.key) -> None:
            text = body if isinstance(body, str) else json.dumps({"model": SIMULATED, "max_tokens": 4, **body})
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            statuses.append((await http.post(path, content=text, headers=headers)).status_code)

        for path, bodies in BODIES.items():
            for body in bodies:
                await ask(path, body)
        for key in (kept.revoked, kept.key[:-1], f"{kept.key}x", f"{kept.key}.{kept.key}"):
            await ask("/v1/completions", {"prompt": CANARY}, key)
        for path in (f"/v1/models?api_key={kept.key}", f"/{kept.key}", f"/v1/responses/{kept.key}"):
            await http.get(path)
            await http.get(path, headers={"authorization": f"Basic {kept.key}"})
        statuses += [
            (await http.post("/v1/messages", json={"messages": CANARY}, headers={"x-api-key": key})).status_code
            for key in (kept.key, kept.revoked)
        ]
    return statuses


async def by_grpc(kept: Kept) -> None:
    async with grpc.aio.insecure_channel(kept.served.grpc) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        for key in (kept.key, kept.revoked):
            metadata = (("authorization", f"Bearer {key}"),)
            for asked in (
                {"prompt": CANARY, "sampling": pb.Sampling(max_tokens=4)},
                {"prompt": CANARY * 9000},
                {"prompt": CANARY, "sampling": pb.Sampling(temperature=-1, stop=[CANARY])},
                {"prompt": CANARY, "structured_output": pb.StructuredOutput(regex=f"({CANARY}")},
            ):
                request = pb.GenerateRequest(model=SIMULATED, **asked)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await stub.Generate(request, metadata=metadata)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for _ in stub.GenerateStream(request, metadata=metadata):
                        pass


def by_batch(kept: Kept) -> None:
    with openai.OpenAI(base_url=f"{kept.served.http}/v1", api_key=kept.key) as client:
        for text in ("".join(json.dumps(line) + "\n" for line in LINES), f'{{"custom_id": "{CANARY}\n'):
            file = client.files.create(file=(f"{CANARY}.jsonl", io.BytesIO(text.encode())), purpose="batch")
            batch = client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"a": CANARY}
            )

            def look(batch_id: str = batch.id) -> Any:
                now = client.batches.retrieve(batch_id)
                return now if now.status in ("completed", "failed") else None

            eventually(look, 120, "the batch has ended")


def logs(kept: Kept) -> list[Path]:
    """Of all processes; and of this home, but for what is kept there to be kept."""
    folders: set[Path] = set()
    for process in words_below(kept.served.process.pid):
        with contextlib.suppress(psutil.Error):
            for file in process.open_files():
                above, found, _ = file.path.partition("/logs/")
                if found and "session_" in above:
                    folders.add(Path(above) / "logs")
    assert folders
    home = [file for file in (kept.folder / "home").rglob("*") if file.is_file()]
    return [kept.served.log, *home, *(file for folder in folders for file in folder.rglob("*") if file.is_file())]


async def test_no_log_and_no_metric_has_prompts_or_keys(kept: Kept) -> None:
    statuses = await by_http(kept)
    assert statuses.count(200) >= 6
    assert statuses.count(401) >= 4
    assert not [status for status in statuses if status >= 500]
    await by_grpc(kept)
    await asyncio.to_thread(by_batch, kept)
    async with httpx.AsyncClient(base_url=kept.served.http, headers={"authorization": f"Bearer {kept.admin}"}) as http:
        told = {path: (await http.get(path)).raise_for_status().text for path in ("/metrics", "/hycluster/requests")}
    told |= {str(file): file.read_bytes().decode(errors="replace") for file in logs(kept)}
    assert any("request_id" in text for text in told.values()), "the requests' own lines"
    found = [
        (name, secret, text[max(0, text.index(secret) - 300) : text.index(secret) + 100])
        for name, text in told.items()
        for secret in kept.secrets
        if secret in text
    ]
    assert not found
