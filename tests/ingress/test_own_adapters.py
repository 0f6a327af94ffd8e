"""Adapters that a project has loaded: through the whole of both ingresses, with real keys, over a simulated engine that
takes adapters and says the same with each."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from hycluster.adapters import LOAD, UNLOAD, AdapterEntry
from hycluster.auth.caller import Caller, calling
from hycluster.client import AsyncClient
from hycluster.core import Priority
from hycluster.engine import messages
from hycluster.engine.simulated import SimulatedEngine
from hycluster.errors import UnknownModel
from hycluster.ingress.grpc import serve_grpc
from hycluster.ingress.starting import WaitingGenerator
from hycluster.settings.ingress import Grpc, Http
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from tests.auth.keyed import Keyed, keyed
from tests.simulated_pool import SimulatedPool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

ENGINE = Simulated(vocab_size=256, max_model_len=512, realtime=False)
MODEL = "tiny"


class TakesAdapters(SimulatedEngine):
    """As a real one answers."""

    def call(self, client: int, call_id: int, method: str, args: Sequence[Any]) -> None:
        if method not in ("add_lora", "remove_lora"):
            super().call(client, call_id, method, args)
            return
        answer = messages.UtilityOutput(call_id, result=(None, True))
        self._send(client, messages.EngineCoreOutputs(utility_output=answer, timestamp=time.monotonic()))


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keyed]:
    with keyed(tmp_path) as known:
        yield known


@dataclass
class Service:
    http: httpx.AsyncClient
    grpc: str
    generator: Any
    app: Any

    async def post(self, key: str, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body, headers={"authorization": f"Bearer {key}"})

    async def load(self, key: str, name: str, path: str, **more: Any) -> httpx.Response:
        return await self.post(key, LOAD, lora_name=name, lora_path=path, **more)

    async def ask(self, key: str, model: str) -> httpx.Response:
        return await self.post(key, "/v1/completions", model=model, prompt="hi", max_tokens=2)

    async def listed(self, key: str) -> list[str]:
        answer = await self.http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        by_http = [card["id"] for card in answer.json()["data"]]
        async with AsyncClient(self.grpc, api_key=key) as client:
            assert [card.name for card in await client.list_models()] == by_http
        return by_http


@pytest.fixture
async def service(tmp_path: Path, tiny_model: Path, keys: Keyed) -> AsyncIterator[Service]:
    from hycluster.gateway.generation import Generator
    from hycluster.gateway.opening import open_gateway
    from hycluster.ingress.http import model_apps, over_all_models, serve_http

    model = Model(
        name=MODEL,
        source=str(tiny_model),
        simulated=ENGINE,
        engine={"max_model_len": 512, "enable_lora": True, "max_lora_rank": 8},
    )
    for project in ("search", "other"):
        (tmp_path / "acme" / project / "tuned").mkdir(parents=True)
    with SimulatedPool(ENGINE, 1, TakesAdapters) as pool:
        async with open_gateway(
            model, pool.directory(model), router=Router(), admission=Admission(), wait_s=10
        ) as gateway:
            generator = Generator({MODEL: gateway})
            generator.adapter_folder = str(tmp_path)
            http = await serve_http(generator, Http(port=0), guard=keys.guard, drain_timeout_s=1)
            grpc = await serve_grpc(generator, Grpc(port=0), guard=keys.guard)
            app = over_all_models(await model_apps(generator, Http()), generator)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{http.port}", timeout=60) as client:
                yield Service(client, f"127.0.0.1:{grpc.port}", generator, app)
            await http.stop()
            await grpc.stop(0)


async def test_a_projects_adapter_is_there_for_it_alone(service: Service, keys: Keyed) -> None:
    loads, uses, foreign, admin = (
        keys.key("adapters"), keys.key(), keys.key("adapters", other=True), keys.key("admin", other=True)
    )  # fmt: skip
    assert (await service.load(loads, "mine", "tuned")).status_code == 200
    assert await service.listed(uses) == [MODEL, "mine"]
    for key in (foreign, admin):
        assert await service.listed(key) == [MODEL]
    answer = await service.ask(uses, "mine")
    assert (answer.status_code, answer.json()["model"]) == (200, "mine")
    assert (await service.http.get("/v1/models/mine", headers={"authorization": f"Bearer {uses}"})).status_code == 200
    # To others it is as one that was never there.
    for key, name in ((foreign, "mine"), (admin, "mine"), (foreign, "mine@acme/search"), (uses, "mine@acme/search")):
        never = (await service.ask(key, "never")).text
        found = await service.ask(key, name)
        assert (found.status_code, found.text) == (404, never.replace("never", name))
        card = await service.http.get(f"/v1/models/{name}", headers={"authorization": f"Bearer {key}"})
        assert card.status_code == 404
        async with AsyncClient(service.grpc, api_key=key) as client:
            for call in (
                client.generate(name, prompt="hi", max_tokens=2),
                client.tokenize(name, prompt="hi"),
                client.count_tokens(name, ["hi"]),
            ):
                with pytest.raises(UnknownModel) as error:
                    await call
                assert "acme" not in error.value.message.replace(name, "")
    async with AsyncClient(service.grpc, api_key=uses) as client:
        assert (await client.generate("mine", prompt="hi", max_tokens=2)).model == "mine"


async def test_two_projects_have_one_name_each_for_itself(service: Service, keys: Keyed) -> None:
    mine, theirs = keys.key("adapters"), keys.key("adapters", other=True)
    for key in (mine, theirs):
        assert (await service.load(key, "tuned", "tuned")).status_code == 200
        assert await service.listed(key) == [MODEL, "tuned"]
        assert (await service.ask(key, "tuned")).status_code == 200
    sent = {entry: word.source for entry, word in service.generator.gateways[MODEL].adapters.words.items()}
    assert sent.keys() == {"tuned@acme/search", "tuned@acme/other"}
    assert len(set(sent.values())) == 2
    # Engines tell requests apart by name and number.
    with calling(Caller("acme", "search", "")):
        own = service.generator.gateways[MODEL].lora_requests["tuned"]
    with calling(Caller("acme", "other", "")):
        other = service.generator.gateways[MODEL].lora_requests["tuned"]
    assert own.lora_name != other.lora_name
    assert own.lora_int_id != other.lora_int_id
    assert (await service.post(mine, UNLOAD, lora_name="tuned")).status_code == 200
    assert (await service.ask(mine, "tuned")).status_code == 404
    assert (await service.ask(theirs, "tuned")).status_code == 200


async def test_who_may_load_and_from_where(service: Service, keys: Keyed, tmp_path: Path) -> None:
    key = keys.key("adapters")
    for wrong in (keys.key(), keys.key("batch", "priority")):
        for path, body in ((LOAD, {"lora_name": "x", "lora_path": "tuned"}), (UNLOAD, {"lora_name": "x"})):
            assert (await service.post(wrong, path, **body)).status_code == 403
    (tmp_path / "acme" / "search" / "out").symlink_to(tmp_path / "acme" / "other" / "tuned")
    (tmp_path / "acme" / "search" / "half").mkdir()
    (tmp_path / "acme" / "search" / "half" / "adapter_model.safetensors").symlink_to("/etc/passwd")
    said = set()
    for path in ("../other/tuned", "../other/nothing", "/etc", "/nothing", "org/on-a-hub", "nothing", "out", "half"):
        answer = await service.load(key, "x", path)
        assert answer.status_code == 400, path
        said.add(answer.json()["error"]["message"].replace(repr(path), ""))
    assert len(said) == 1, "whether there is something is not said"
    for name in ("x@acme/other", "x@acme/search", "a b", MODEL):
        assert (await service.load(key, name, "tuned")).status_code == 400
    assert (await service.post(key, UNLOAD, lora_name="never")).status_code == 404
    # As a whole path it is the same folder.
    assert (await service.load(key, "x", str(tmp_path / "acme" / "search" / "tuned"))).status_code == 200
    again = await service.load(key, "x", "tuned", load_inplace=True)
    assert (again.status_code, "acme/search" in again.text) == (400, False)


async def test_administrators_load_for_all_and_for_one(service: Service, keys: Keyed, tmp_path: Path) -> None:
    admin, uses, foreign = keys.key("admin"), keys.key("adapters"), keys.key("adapters", other=True)
    folder = str(tmp_path / "acme" / "search" / "tuned")
    assert (await service.load(admin, "all", folder)).status_code == 200
    assert (await service.load(admin, "given@acme/search", folder)).status_code == 200
    assert (await service.load(admin, "given@acme", folder)).status_code == 400
    assert await service.listed(uses) == [MODEL, "all", "given"]
    assert await service.listed(foreign) == [MODEL, "all"]
    # One's own goes before that for all, and only that is one's own to unload.
    assert (await service.post(foreign, UNLOAD, lora_name="all")).status_code == 404
    assert (await service.post(foreign, UNLOAD, lora_name="given@acme/search")).status_code == 404
    assert (await service.load(foreign, "all", "tuned")).status_code == 200
    assert await service.listed(foreign) == [MODEL, "all"]
    with calling(Caller("acme", "other", "")):
        assert service.generator.gateways[MODEL].lora_requests["all"].lora_name == "all@acme/other"
    assert (await service.post(foreign, UNLOAD, lora_name="all")).status_code == 200
    assert (await service.ask(foreign, "all")).status_code == 200
    assert (await service.post(admin, UNLOAD, lora_name="given@acme/search")).status_code == 200
    assert await service.listed(uses) == [MODEL, "all"]


async def test_a_batchs_lines_use_those_of_its_project(service: Service, keys: Keyed) -> None:
    from hycluster.ingress.in_process import post

    assert (await service.load(keys.key("adapters"), "mine", "tuned")).status_code == 200
    line = {"model": "mine", "prompt": "hi", "max_tokens": 2, "priority": int(Priority.BATCH)}
    statuses = []
    for project in ("search", "other"):
        with calling(Caller("acme", project, "k", scopes=frozenset({"batch"}))):
            answer = await post(
                service.app, "/v1/completions", json.dumps(line).encode(), {"content-type": "application/json"}
            )
        statuses.append(answer.status)
    assert statuses == [200, 404]


async def test_no_metric_names_it(service: Service, keys: Keyed) -> None:
    key = keys.key("adapters")
    assert (await service.load(key, "secret-plan", "tuned")).status_code == 200
    assert (await service.ask(key, "secret-plan")).status_code == 200
    async with AsyncClient(service.grpc, api_key=key) as client:
        await client.generate("secret-plan", prompt="hi", max_tokens=2)
    scraped = await service.http.get("/metrics", headers={"authorization": f"Bearer {keys.key('admin', other=True)}"})
    assert scraped.status_code == 200
    assert "secret-plan" not in scraped.text


async def test_while_a_service_starts_others_are_not_named(keys: Keyed) -> None:
    async def names() -> list[str]:
        return [MODEL, "all", "mine@acme/search", "hidden@acme/other"]

    async def pools() -> dict[str, Any]:
        return {}

    generator = WaitingGenerator(pools, names)
    with calling(Caller("acme", "search", "")):
        with pytest.raises(UnknownModel, match=r"served are 'tiny', 'all', 'mine'$"):
            await generator.tokenize("hidden", prompt="hi")
        with contextlib.suppress(Exception):
            await generator.tokenize("mine", prompt="hi")
            raise AssertionError("it is not served yet")


async def test_names_that_a_project_has_had_are_bounded(
    service: Service, keys: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hycluster.gateway.adapters.MAX_OF_PROJECT", 2)
    words = {f"{name}@acme/search": AdapterEntry(1, "x", None) for name in ("a", "b")}
    service.generator.gateways[MODEL].adapters.take_over(words)
    assert (await service.load(keys.key("adapters"), "c", "tuned")).status_code == 400
    assert (await service.load(keys.key("adapters"), "b", "tuned")).status_code == 200
    assert (await service.load(keys.key("adapters", other=True), "c", "tuned")).status_code == 200
