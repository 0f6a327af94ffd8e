"""Responses at several ingress processes over one store, driven by the official client; a stand-in is their model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client import REGISTRY

from hycluster.auth.caller import Caller, calling
from hycluster.ingress.metrics import Counted
from hycluster.observe import timelines
from hycluster.responses.app import WithResponses
from hycluster.responses.background import Background
from hycluster.responses.store import ResponseStore
from hycluster.settings.ingress import Batches, Http, Responses
from hycluster.timeline import Timeline
from hycluster.trace_context import TraceContext
from tests.responses.stand_in import StandInApp
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.timeout(120)
ENDED = ("completed", "incomplete", "failed", "cancelled")
LEASE_S = 0.3


class IngressInProcess:
    """An ingress process' layer with a model of its own, and who asks it."""

    def __init__(self, place: Path, **settings: Any) -> None:
        self.settings = Responses(**{"poll_s": 0.02, "lease_s": LEASE_S} | settings)
        self.model = StandInApp()
        self.store = ResponseStore(self.settings, Batches(store=str(place)))
        self.background = Background(self.model.app, self.store, self.settings, retry_for_s=5, max_bytes=1 << 20)
        self.app = WithResponses(self.model.app, self.store, self.background, Http())
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://ingress")
        module: Any = __import__(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])
        # The client brings its own httpx, under a name that depends on its version.
        client = module.AsyncClient(transport=module.ASGITransport(self.app))
        self.client = openai.AsyncOpenAI(
            base_url="http://ingress/v1", api_key="none", max_retries=0, http_client=client
        )
        self.running = asyncio.create_task(self.background.run())

    async def ask(self, text: Any = "hello", **fields: Any) -> Any:
        return await self.client.responses.create(model="m", input=text, **fields)

    async def create(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/responses", json={"model": "m", "input": "hello"} | body)

    async def ended(self, response_id: str) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            while (now := await self.client.responses.retrieve(response_id)).status not in ENDED:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return now

    async def streamed(self) -> str:
        """The one that is being answered in the background."""
        await until(lambda: any(name.startswith("resp_") for name in self.store.folder.names("asked")))
        (response_id,) = self.store.open_ids()
        return response_id

    async def die(self) -> None:
        """As by SIGKILL: nobody hears of it, and what it had in the background goes no further."""
        self.running.cancel()
        tasks = [answering.task for answering in self.background._running.values()]
        for task in filter(None, tasks):
            task.cancel()
        await asyncio.gather(self.running, *filter(None, tasks), return_exceptions=True)

    async def close(self) -> None:
        await self.die()
        await self.http.aclose()
        await self.client.close()


Open = Callable[..., IngressInProcess]


@asynccontextmanager
async def ingresses(place: Path) -> AsyncIterator[Open]:
    async with AsyncExitStack() as stack:

        def one(**settings: Any) -> IngressInProcess:
            ingress = IngressInProcess(place, **settings)
            stack.push_async_callback(ingress.close)
            return ingress

        yield one


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Open]:
    async with ingresses(tmp_path / "store") as one:
        yield one


@pytest.fixture
async def first(opened: Open) -> IngressInProcess:
    return opened()


@pytest.fixture
async def second(opened: Open) -> IngressInProcess:
    return opened()


class TestConversations:
    async def test_what_one_ingress_process_answered_another_one_goes_on_from(
        self, first: IngressInProcess, second: IngressInProcess
    ) -> None:
        one = await first.ask("a")
        two = await second.ask("b", previous_response_id=one.id)
        three = await first.ask([{"role": "user", "content": "c"}], previous_response_id=two.id)
        assert (one.output_text, two.output_text) == ("<a>", "<a|<a>|b>")
        assert three.output_text == "<a|<a>|b|<a|<a>|b>|c>"
        assert (three.previous_response_id, one.previous_response_id) == (two.id, None)
        # vLLM's own store, which is of one process, is never asked.
        for body in first.model.bodies + second.model.bodies:
            assert body["store"] is False
            assert "previous_response_id" not in body

    async def test_a_tool_call_comes_before_its_output(self, first: IngressInProcess, second: IngressInProcess) -> None:
        call = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}"}
        first.model.calls = [call, {"type": "message", "role": "assistant", "id": "m", "content": []}]
        one = await first.ask("a")
        answer = {"type": "function_call_output", "call_id": "c1", "output": "7"}
        await second.ask([answer], previous_response_id=one.id)
        # Without the message that is empty, which vLLM can't read.
        assert second.model.bodies[0]["input"][1:] == [call, answer]

    async def test_instructions_are_not_carried_on(self, first: IngressInProcess) -> None:
        one = await first.ask("a", instructions="be brief")
        await first.ask("b", previous_response_id=one.id)
        assert "instructions" not in first.model.bodies[1]
        assert not any("be brief" in json.dumps(item) for item in first.model.bodies[1]["input"])

    async def test_the_model_is_that_of_before(self, first: IngressInProcess) -> None:
        one = (await first.create(model="another")).json()
        two = await first.http.post("/v1/responses", json={"input": "b", "previous_response_id": one["id"]})
        assert two.json()["model"] == "another"

    async def test_a_stream_is_kept_too(self, first: IngressInProcess, second: IngressInProcess) -> None:
        events = [event async for event in await first.ask("a", stream=True)]
        assert [event.type for event in events] == [
            "response.created", "response.output_text.delta", "response.completed",
        ]  # fmt: skip
        assert {event.response.id for event in events if hasattr(event, "response")} == {events[0].response.id}
        two = await second.ask("b", previous_response_id=events[0].response.id)
        assert two.output_text == "<a|<a>|b>"

    async def test_one_that_is_not_stored(self, first: IngressInProcess) -> None:
        one = (await first.create(store=False)).json()
        assert one["store"] is False
        two = await first.create(previous_response_id=one["id"])
        assert two.status_code == 404
        assert two.json()["error"]["message"].startswith(f"previous_response_id: {one['id']!r} is not here")

    async def test_an_unfinished_one(self, first: IngressInProcess) -> None:
        first.model.hold.clear()
        one = await first.ask(background=True)
        two = await first.create(previous_response_id=one.id)
        assert two.status_code == 400
        assert "is in_progress; only one that was answered can be gone on from" in two.json()["error"]["message"]

    async def test_short_requests_for_long_conversations_are_bounded(self, first: IngressInProcess) -> None:
        one = await first.ask("x" * 10_000)
        first.app._most_bytes_together = 30_000
        first.model.hold.clear()
        streams = [asyncio.create_task(first.create(previous_response_id=one.id, stream=True)) for _ in range(2)]
        await until(lambda: any(s.done() for s in streams))
        first.model.hold.set()
        assert sorted([(await stream).status_code for stream in streams]) == [200, 429]
        assert (await first.create(previous_response_id=one.id)).status_code == 200
        first.app._most_items = 1
        refused = await first.create(previous_response_id=one.id)
        assert refused.status_code == 400
        assert "makes an input of 3 items; at most 1 are allowed" in refused.json()["error"]["message"]
        first.app._most_bytes = 5_000
        assert (await first.create(previous_response_id=one.id)).status_code == 400

    async def test_a_batch_line_goes_on_and_is_not_kept(self, first: IngressInProcess) -> None:
        one = await first.ask("a")
        line = WithResponses(first.model.app, first.store, None, Http())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(line), base_url="http://b") as http:
            body = {"model": "m", "input": "b", "previous_response_id": one.id}
            two = (await http.post("/v1/responses", json=body)).json()
            refused = await http.post("/v1/responses", json=body | {"background": True})
        assert (two["output"][0]["content"][0]["text"], two["store"]) == ("<a|<a>|b>", False)
        assert (refused.status_code, "line of a batch" in refused.text) == (400, True)


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({"background": True, "store": False}, "background: true is not allowed with 'store': false"),
            ({"conversation": "conv_1"}, "conversation: there are none here"),
            ({"store": True, "request_id": "mine"}, "request_id: 'mine' is not allowed for what is stored"),
            ({"previous_response_id": 7}, "previous_response_id: 7 is not allowed"),
            (
                {"input": ["x", {"type": "item_reference", "id": "fc_1"}]},
                "input[1].type: 'item_reference' is not allowed",
            ),
            ({"previous_response_id": "x", "previous_input_messages": [{}]}, "at most one may be set"),
        ],
    )
    async def test_what_is_not_done_is_said(self, first: IngressInProcess, body: Any, message: str) -> None:
        answer = await first.create(**body)
        assert (answer.status_code, first.model.bodies) == (400, [])
        assert message in answer.json()["error"]["message"]

    @pytest.mark.parametrize("content", [b"", b"[]", b"nonsense", b'{"model": "m"}', b'{"model": "m", "input": 5}'])
    async def test_what_is_no_request_is_vllms_to_refuse(self, first: IngressInProcess, content: bytes) -> None:
        answer = await first.http.post("/v1/responses", content=content)
        assert answer.status_code == 400
        assert len(first.model.bodies) <= 1

    async def test_without_a_store(self) -> None:
        model = StandInApp()
        app = WithResponses(model.app, None, None, Http())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://i") as http:
            plain = await http.post("/v1/responses", json={"model": "m", "input": "a"})
            assert (plain.status_code, plain.json()["store"]) == (200, False)
            for body in ({"store": True}, {"background": True}):
                refused = await http.post("/v1/responses", json={"model": "m", "input": "a"} | body)
                assert refused.status_code == 400
                assert "'responses' or 'batches' of the settings is null" in refused.json()["error"]["message"]
            assert (await http.get(f"/v1/responses/{plain.json()['id']}")).status_code == 404
        assert len(model.bodies) == 1

    async def test_what_can_not_be_stored_is_answered_all_the_same(
        self, first: IngressInProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(first.store, "put", full)
        assert (await first.create()).json()["store"] is False
        refused = await first.create(background=True)
        assert (refused.status_code, "no space left" in refused.text) == (503, True)
        await until(lambda: first.model.running == 0)

    async def test_other_routes_pass(self, first: IngressInProcess) -> None:
        assert (await first.http.get("/v1/models")).json() == {"data": []}


class TestKept:
    async def test_it_is_found_at_every_ingress_process(
        self, first: IngressInProcess, second: IngressInProcess
    ) -> None:
        one = await first.ask("a")
        found = await second.client.responses.retrieve(one.id)
        assert (found.output_text, found.status) == ("<a>", "completed")
        items = await second.client.responses.input_items.list(one.id)
        assert [item.to_dict()["content"] for item in items.data] == [[{"type": "input_text", "text": "a"}]]
        await second.client.responses.delete(one.id)
        for ingress in (first, second):
            assert (await ingress.http.get(f"/v1/responses/{one.id}")).status_code == 404

    async def test_another_projects_is_not_there(self, first: IngressInProcess, second: IngressInProcess) -> None:
        mine, colleague, other = (Caller("acme", *names) for names in (("a", "k"), ("a", "l"), ("b", "k")))
        with calling(mine):
            kept = (await first.create()).json()
            begun = (await first.create(background=True)).json()
            await first.ended(begun["id"])
        for each in (kept, begun):
            path, goes_on = f"/v1/responses/{each['id']}", {"previous_response_id": each["id"]}
            assert "caller" not in each
            with calling(other):
                answers = [
                    await second.http.get(path),
                    await second.http.get(f"{path}/input_items"),
                    await second.http.post(f"{path}/cancel"),
                    await second.http.delete(path),
                    await second.create(**goes_on),
                ]
            assert [answer.status_code for answer in answers] == [404] * 5
            with calling(colleague):
                assert (await second.http.get(path)).status_code == 200
                assert (await second.create(**goes_on)).status_code == 200

    @pytest.mark.parametrize("name", ["resp_x", "..%2F..%2Fetc", "none kept", "resp_" + "f" * 36])
    async def test_one_that_is_not_there(self, first: IngressInProcess, name: str) -> None:
        for ask in (first.http.get, first.http.delete):
            answer = await ask(f"/v1/responses/{name}")
            assert answer.status_code == 404
            assert answer.json()["error"]["type"] in ("NotFoundError", "BadRequestError")

    async def test_the_oldest_go_when_there_are_too_many(self, opened: Open) -> None:
        ingress = opened(max_stored=3)
        made = []
        for number in range(6):
            made.append((await ingress.ask(str(number))).id)
            # Ids of one millisecond are in no order.
            await asyncio.sleep(0.002)
        await asyncio.to_thread(ingress.store.sweep)
        there = [(await ingress.http.get(f"/v1/responses/{i}")).status_code for i in made]
        assert there == [404, 404, 404, 200, 200, 200]

    async def test_ingress_processes_look_after_the_bounds_by_themselves(self, opened: Open) -> None:
        ingress = opened(max_stored=2, max_stored_gib=0.5)
        for _ in range(10):
            await ingress.ask("a")
        await until(lambda: len(list(ingress.store.folder.names("asked"))) <= 3)

    async def test_what_comes_while_they_look_is_looked_at_too(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ingress = opened(max_stored=2, max_stored_gib=0.5)
        sizes, asked = ingress.store._sizes, threading.Event()

        def slowly() -> dict[str, int]:
            found = sizes()
            asked.wait(PATIENCE_S)
            return found

        monkeypatch.setattr(ingress.store, "_sizes", slowly)
        for _ in range(10):
            await ingress.ask("a")
        asked.set()
        await until(lambda: len(list(ingress.store.folder.names("asked"))) <= 3)

    async def test_bytes_count_too(self, opened: Open) -> None:
        ingress = opened(max_stored_gib=50_000 / (1 << 30))
        for _ in range(10):
            await ingress.ask("x" * 10_000)
        await asyncio.to_thread(ingress.store.sweep)
        total = sum(info.size for info in ingress.store.folder.entries("asked"))
        assert 20_000 < total <= 50_000

    async def test_the_old_are_gone_at_once_and_deleted_later(self, opened: Open) -> None:
        old = opened()
        one = await old.ask("a")
        ingress = opened(keep_days=0.1 / 86400)
        await asyncio.sleep(0.15)
        assert (await ingress.http.get(f"/v1/responses/{one.id}")).status_code == 404
        assert (await ingress.create(previous_response_id=one.id)).status_code == 404
        await asyncio.to_thread(ingress.store.sweep)
        assert not list(ingress.store.folder.names("asked"))


class TestInTheBackground:
    async def test_asked_here_and_fetched_there(self, first: IngressInProcess, second: IngressInProcess) -> None:
        first.model.hold.clear()
        one = await first.ask("a", background=True)
        assert (one.status, one.background, one.output) == ("in_progress", True, [])
        assert (await second.client.responses.retrieve(one.id)).status == "in_progress"
        first.model.hold.set()
        ended = await second.ended(one.id)
        assert (ended.status, ended.output_text, ended.background) == ("completed", "<a>", True)
        assert (await second.ask("b", previous_response_id=one.id)).output_text == "<a|<a>|b>"
        assert not second.store.open_ids()
        assert not list(second.store.folder.names("claims"))

    async def test_it_is_counted_as_its_models(self, first: IngressInProcess) -> None:
        labels = {"model": "m", "method": "POST", "handler": "/v1/responses"}

        def counted(status: str) -> float:
            return REGISTRY.get_sample_value("http_requests_total", labels | {"status": status}) or 0.0

        before = counted("200"), counted("503")
        transport = httpx.ASGITransport(Counted(first.app, ["/v1/responses"]))
        async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as http:
            body = {"model": "m", "input": "a", "background": True}
            begun = (await http.post("/v1/responses", json=body)).json()
            await first.ended(begun["id"])
            first.model.refusals = [503]
            assert (await http.post("/v1/responses", json=body)).status_code == 503
        assert (counted("200"), counted("503")) == (before[0] + 1, before[1] + 1)

    async def test_its_time_is_told_apart(self, first: IngressInProcess, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the same id and in the same trace: the request that began it ends long before."""
        recorder = timelines.Recorder()
        monkeypatch.setattr(timelines, "recorder", recorder)
        ended: list[Timeline] = []
        recorder.ended.append(ended.append)
        recorder.samples = lambda _, parent: parent is not None
        first.model.hold.clear()
        with timelines.Carried("mine", "POST /v1/responses", TraceContext(5, 6, True)) as begun:
            one = await first.ask("a", background=True)
        assert ended == [begun]
        first.model.hold.set()
        await first.ended(one.id)
        await until(lambda: len(ended) > 1)
        answered = ended[1]
        assert (answered.id, answered.trace_id, answered.parent) == ("mine", 5, begun.context)
        # It has come to its own end, though nobody listens to its last words.
        assert answered.status == "ok"
        assert begun.ended_s is not None
        assert answered.began_s < begun.ended_s < (answered.ended_s or 0)

    @pytest.mark.parametrize("status", [400, 404, 429, 503])
    async def test_what_is_refused_is_refused_at_once(self, first: IngressInProcess, status: int) -> None:
        first.model.refusals = [status]
        answer = await first.create(background=True)
        assert (answer.status_code, answer.json()["error"]["message"]) == (status, f"refused with {status}")
        assert not list(first.store.folder.names("asked"))

    async def test_cancelled_at_another_ingress_process(
        self, first: IngressInProcess, second: IngressInProcess
    ) -> None:
        first.model.hold.clear()
        one = await first.ask("a", background=True)
        assert (await second.client.responses.cancel(one.id)).status == "cancelled"
        await until(lambda: first.model.running == 0)
        first.model.hold.set()
        assert (await first.client.responses.retrieve(one.id)).status == "cancelled"
        # Once more is fine; of one that has its answer it is said.
        assert (await first.client.responses.cancel(one.id)).status == "cancelled"
        two = await first.ask("b", background=True)
        await first.ended(two.id)
        refused = await second.http.post(f"/v1/responses/{two.id}/cancel")
        assert (refused.status_code, "it can't be cancelled any more" in refused.text) == (400, True)

    async def test_ended_at_its_own_ingress_process_it_stops_at_once(self, opened: Open) -> None:
        # Longer than is waited here.
        ingress = opened(poll_s=60)
        for end in (ingress.client.responses.cancel, ingress.client.responses.delete):
            ingress.model.hold.clear()
            one = await ingress.ask("a", background=True)
            await until(lambda: ingress.model.running == 1)
            await end(one.id)
            await until(lambda: ingress.model.running == 0)

    async def test_one_that_was_answered_directly_can_not_be_cancelled(self, first: IngressInProcess) -> None:
        one = await first.ask("a")
        assert (await first.http.post(f"/v1/responses/{one.id}/cancel")).status_code == 400

    async def test_deleted_while_it_is_answered(self, first: IngressInProcess, second: IngressInProcess) -> None:
        first.model.hold.clear()
        one = await first.ask("a", background=True)
        await second.client.responses.delete(one.id)
        await until(lambda: first.model.running == 0)
        assert (await first.http.get(f"/v1/responses/{one.id}")).status_code == 404

    async def test_another_one_answers_what_a_dead_ingress_process_had(
        self, first: IngressInProcess, second: IngressInProcess
    ) -> None:
        first.model.hold.clear()
        one = await first.ask("a", background=True)
        # It has no time at first.
        second.model.refusals = [503]
        await first.die()
        ended = await second.ended(one.id)
        assert (ended.id, ended.status, ended.output_text) == (one.id, "completed", "<a>")

    async def test_a_living_one_keeps_what_it_has(self, first: IngressInProcess, second: IngressInProcess) -> None:
        first.model.hold.clear()
        one = await first.ask("a", background=True)
        await asyncio.sleep(3 * LEASE_S)
        assert second.model.bodies == []
        first.model.hold.set()
        assert (await first.ended(one.id)).status == "completed"

    async def test_what_kills_one_after_the_other_fails(self, opened: Open) -> None:
        ingress = opened()
        ingress.model.hold.clear()
        one = await ingress.ask("a", background=True)
        for _ in range(2):
            await ingress.die()
            ingress = opened()
            ingress.model.hold.clear()
            await until(partial(getattr, ingress.model, "running"))
        await ingress.die()
        ended = await opened().ended(one.id)
        assert (ended.status, ended.error.code) == ("failed", "server_error")
        assert ended.error.message == "3 ingress processes died while they answered it"

    async def test_one_that_is_stopped_gives_back_what_it_can_not_end(self, opened: Open) -> None:
        # Nobody waits for the end of its lease.
        first, second = opened(lease_s=600), opened(lease_s=600)
        first.model.hold.clear()
        one = await first.ask("a", background=True)
        await first.background.close(0.1)
        assert (await second.ended(one.id)).status == "completed"
        refused = await first.create(background=True)
        assert refused.status_code == 429

    async def test_one_that_is_stopped_ends_what_it_can(self, first: IngressInProcess) -> None:
        first.model.hold.clear()
        one = await first.ask("a", background=True)
        closing = asyncio.create_task(first.background.close(5))
        await asyncio.sleep(0.05)
        first.model.hold.set()
        await closing
        assert (await first.client.responses.retrieve(one.id)).status == "completed"

    async def test_a_broken_answer_has_failed(self, first: IngressInProcess) -> None:
        first.model.ending = None
        one = await first.ask("a", background=True)
        ended = await first.ended(one.id)
        assert (ended.status, ended.error.message) == (
            "failed", "the answer ended early: the engine or the ingress process broke it off",
        )  # fmt: skip

    async def test_an_incomplete_one(self, first: IngressInProcess) -> None:
        first.model.ending = "incomplete"
        one = await first.ask("a", background=True)
        assert (await first.ended(one.id)).status == "incomplete"

    async def test_they_are_bounded(self, opened: Open) -> None:
        ingress = opened(max_background=1)
        ingress.model.hold.clear()
        await ingress.ask("a", background=True)
        refused = await ingress.create(background=True)
        assert (refused.status_code, "responses.max_background allows 1" in refused.text) == (429, True)
        assert int(refused.headers["retry-after"]) >= 1


class TestStreamsInTheBackground:
    async def test_followed_at_every_ingress_process(self, first: IngressInProcess, second: IngressInProcess) -> None:
        first.model.hold.clear()
        live = asyncio.create_task(first.create(stream=True, background=True))
        response_id = await first.streamed()
        there = asyncio.create_task(second.http.get(f"/v1/responses/{response_id}?stream=true"))
        later = asyncio.create_task(second.http.get(f"/v1/responses/{response_id}?stream=true&starting_after=1"))
        await asyncio.sleep(0.1)
        first.model.hold.set()
        texts = [(await task).text for task in (live, there, later)]
        kinds = [[line[7:] for line in text.splitlines() if line.startswith("event: ")] for text in texts]
        whole = ["response.created", "response.output_text.delta", "response.completed"]
        assert kinds == [whole, whole, whole[2:]]
        assert texts[0] == texts[1] == (await first.http.get(f"/v1/responses/{response_id}?stream=true")).text

    async def test_cancelled_its_readers_hear_so(self, first: IngressInProcess, second: IngressInProcess) -> None:
        first.model.hold.clear()
        live = asyncio.create_task(first.create(stream=True, background=True))
        response_id = await first.streamed()
        await second.client.responses.cancel(response_id)
        last = json.loads((await live).text.strip().splitlines()[-1].removeprefix("data: "))
        assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")

    async def test_it_ends_with_its_ingress_process(self, first: IngressInProcess, second: IngressInProcess) -> None:
        first.model.hold.clear()
        live = asyncio.create_task(first.create(stream=True, background=True))
        response_id = await first.streamed()
        await first.die()
        ended = await second.ended(response_id)
        assert (ended.status, ended.error.message) == ("failed", "the ingress process that streamed it died")
        assert second.model.bodies == []
        await live

    async def test_of_one_that_was_no_stream(self, first: IngressInProcess) -> None:
        one = await first.ask("a", background=True)
        answer = await first.http.get(f"/v1/responses/{one.id}?stream=true")
        assert (answer.status_code, "was not asked for with" in answer.text) == (400, True)
