"""What callers of both ingresses rely on, on the real engine."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import grpc
import httpx
import openai
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from hycluster import errors
from hycluster.client import AsyncClient, Client
from hycluster.core import Priority, Sampling, StructuredOutput
from tests.integration.conftest import (
    ALL_MODELS,
    HUNYUAN,
    MODEL,
    SIMULATED,
    TINY,
    Served,
    eventually,
    gather_bounded,
    replicas,
)
from tests.integration.fuzzing import frees_soon, idle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.http}/v1", api_key="none", max_retries=0, timeout=120)


class TestOpenAI:
    """The official client against the HTTP ingress."""

    def test_models_of_all_pools(self, client: openai.OpenAI) -> None:
        assert {model.id for model in client.models.list()} == ALL_MODELS

    def test_chat(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=20)
        assert "Paris" in (answer.choices[0].message.content or "")
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    def test_stream_says_the_same(self, client: openai.OpenAI) -> None:
        ask: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 20}
        whole = client.chat.completions.create(**ask)
        stream = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        assert (
            "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == whole.choices[0].message.content
        )
        used = stream[-1].usage
        assert used is not None
        assert whole.usage is not None
        # What was cached of the prompt is another matter: by then it has been seen.
        assert (used.prompt_tokens, used.completion_tokens) == (
            whole.usage.prompt_tokens,
            whole.usage.completion_tokens,
        )
        assert len(stream) > 5

    def test_n_and_logprobs(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            n=3,
            temperature=1.0,
            seed=1,
            max_tokens=5,
            logprobs=True,
            top_logprobs=2,
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        for choice in answer.choices:
            assert choice.logprobs is not None
            assert choice.logprobs.content is not None
            assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in choice.logprobs.content)

    def test_stop_string(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(
            model=MODEL, prompt="1, 2, 3, 4, 5,", temperature=0, max_tokens=40, stop=["8"]
        )
        assert answer.choices[0].finish_reason == "stop"
        assert "7" in answer.choices[0].text
        assert "8" not in answer.choices[0].text

    def test_structured_output(self, client: openai.OpenAI) -> None:
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "people": {"type": "integer", "maximum": 9}},
            "required": ["city", "people"],
            "additionalProperties": False,
        }
        answer = client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            max_tokens=60,
            temperature=0,
            response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        )
        got = json.loads(answer.choices[0].message.content or "")
        assert got["city"] in ("Paris", "Rome")
        assert isinstance(got["people"], int)

    def test_tool_call(self, client: openai.OpenAI) -> None:
        tool: Any = {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "The weather in a city.",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"enum": ["Paris"]}},
                    "required": ["city"],
                    "additionalProperties": False,
                },
            },
        }
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "How is the weather in Paris?"}],
            tools=[tool],
            tool_choice="required",
            max_tokens=60,
            temperature=0,
        )
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "weather"
        # This small model gets no further; a bare vLLM 0.32 server answers the same.
        assert "Paris" in json.loads(call.function.arguments)

    def test_responses(self, client: openai.OpenAI) -> None:
        answer = client.responses.create(
            model=MODEL, input="What is the capital of France?", temperature=0, max_output_tokens=20
        )
        assert "Paris" in answer.output_text

    def test_tools_without_a_parser_are_refused_by_our_settings_name(self, client: openai.OpenAI) -> None:
        function: Any = {"name": "f", "parameters": {"type": "object", "properties": {}}}
        with pytest.raises(openai.BadRequestError, match=r"models\[\]\.api\.tool_call_parser"):
            client.chat.completions.create(
                model=HUNYUAN, messages=QUESTION, tools=[{"type": "function", "function": function}]
            )
        with pytest.raises(openai.BadRequestError, match=r"models\[\]\.api\.tool_call_parser"):
            client.responses.create(
                model=HUNYUAN, input="hello", tools=[{"type": "function", "strict": None} | function]
            )

    def test_a_response_is_gone_on_from_with_any_model(self, client: openai.OpenAI) -> None:
        one = client.responses.create(model=MODEL, input="Say hello.", temperature=0, max_output_tokens=8)
        two = client.responses.create(
            model=HUNYUAN, input="Again.", previous_response_id=one.id, temperature=0, max_output_tokens=4
        )
        assert (two.previous_response_id, two.model) == (one.id, HUNYUAN)
        assert one.usage
        assert two.usage
        # All that was said before, in the next one's prompt.
        said = client.responses.create(model=HUNYUAN, input="Again.", temperature=0, max_output_tokens=4).usage
        assert said
        assert two.usage.input_tokens > said.input_tokens + 8
        assert client.responses.retrieve(one.id).output_text == one.output_text

    def test_a_response_in_the_background(self, client: openai.OpenAI) -> None:
        begun = client.responses.create(
            model=SIMULATED, input="hello", background=True, max_output_tokens=30, extra_body={"ignore_eos": True}
        )
        assert begun.status == "in_progress"

        def look() -> Any:
            now = client.responses.retrieve(begun.id)
            return now if now.status in ("completed", "incomplete", "failed") else None

        ended = eventually(look, 60, "it has ended")
        assert ended.usage.output_tokens == 30
        long = client.responses.create(
            model=SIMULATED, input="hello", background=True, max_output_tokens=1500, extra_body={"ignore_eos": True}
        )
        assert client.responses.cancel(long.id).status == "cancelled"
        assert client.responses.retrieve(long.id).status == "cancelled"
        eventually(lambda: idle(SIMULATED), 30, "the engine has been told")

    def test_models_are_told_apart(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(model=TINY, prompt="hello", max_tokens=3, temperature=0)
        assert answer.model == TINY


class TestHttp:
    def test_health(self, served: Served) -> None:
        assert httpx.get(f"{served.http}/health").status_code == 200

    def test_tokenize(self, served: Served) -> None:
        answer = httpx.post(f"{served.http}/tokenize", json={"model": MODEL, "prompt": "hello world"}).json()
        assert answer["tokens"] == [28120, 905]

    def test_metrics_of_every_model(self, served: Served) -> None:
        text = httpx.get(f"{served.http}/metrics", follow_redirects=True).text
        for model in ALL_MODELS:
            assert f'model_name="{model}"' in text
        assert text.count("# TYPE vllm:num_requests_running gauge") == 1

    @pytest.mark.parametrize(
        "path", ["/scale_elastic_ep", "/inference/v1/generate", "/invocations", "/v1/load_lora_adapter", "/sleep", "/x"]
    )
    def test_control_routes_are_closed(self, served: Served, path: str) -> None:
        assert httpx.post(f"{served.http}{path}", json={"model": MODEL}).status_code == 404

    @pytest.mark.parametrize(
        ("change", "status", "says"),
        [
            ({"model": "nope"}, 404, "nope"),
            ({"max_tokens": 0}, 400, "max_tokens"),
            ({"max_tokens": -3}, 400, "max_tokens"),
            ({"temperature": -1}, 400, "temperature"),
            ({"n": 0}, 400, "n"),
            ({"prompt": "word " * 5000}, 400, "2048"),
            ({"prompt": ""}, 400, ""),
        ],
    )
    def test_bad_input(self, served: Served, change: dict[str, Any], status: int, says: str) -> None:
        body = {"model": MODEL, "prompt": "hello", "max_tokens": 4} | change
        answer = httpx.post(f"{served.http}/v1/completions", json=body, timeout=30)
        assert answer.status_code == status, answer.text
        assert says in answer.json()["error"]["message"]
        assert "Traceback" not in answer.text

    @pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"model": 3}'])
    def test_broken_bodies(self, served: Served, body: bytes) -> None:
        answer = httpx.post(
            f"{served.http}/v1/completions", content=body, headers={"content-type": "application/json"}, timeout=30
        )
        assert 400 <= answer.status_code < 500, answer.text

    def test_body_over_the_limit(self, served: Served) -> None:
        answer = httpx.post(f"{served.http}/v1/completions", content=b" " * (33 << 20), timeout=60)
        assert answer.status_code == 413


class TestGrpc:
    def test_reflection_alone_is_enough(self, served: Served) -> None:
        with grpc.insecure_channel(served.grpc) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert {"hycluster.v1.Inference", "grpc.health.v1.Health"} <= set(database.get_services())
            pool = descriptor_pool.DescriptorPool(database)
            request = message_factory.GetMessageClass(pool.FindMessageTypeByName("hycluster.v1.GenerateRequest"))
            response = message_factory.GetMessageClass(pool.FindMessageTypeByName("hycluster.v1.GenerateResponse"))
            call = channel.unary_unary(
                "/hycluster.v1.Inference/Generate",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            asked: Any = request(model=MODEL, prompt="The capital of France is")
            asked.sampling.max_tokens = 4
            asked.sampling.temperature = 0
            answer: Any = call(asked, timeout=60)
        assert "Paris" in answer.outputs[0].text
        assert answer.usage.completion_tokens == 4

    def test_health(self, served: Served) -> None:
        with grpc.insecure_channel(served.grpc) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(service="hycluster.v1.Inference"), timeout=60)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    def test_models(self, served: Served) -> None:
        with Client(served.grpc) as caller:
            cards = {card.name: card for card in caller.list_models()}
        assert cards[MODEL].ready_replicas == 2
        assert cards[MODEL].max_model_len == 2048
        assert set(cards) == ALL_MODELS

    def test_n_logprobs_and_usage(self, served: Served) -> None:
        with Client(served.grpc) as caller:
            answer = caller.generate(
                model=MODEL, messages=QUESTION, sampling=Sampling(n=2, temperature=1, seed=3, max_tokens=5, logprobs=2)
            )
        assert [output.index for output in answer.outputs] == [0, 1]
        for output in answer.outputs:
            assert output.logprobs is not None
            assert len(output.logprobs) == len(output.token_ids)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == sum(len(output.token_ids) for output in answer.outputs)

    async def test_tool_calls_and_structured_output(self, served: Served) -> None:
        city = {
            "type": "object",
            "properties": {"city": {"enum": ["Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        }
        weather = {"type": "function", "function": {"name": "weather", "parameters": city, "strict": True}}
        greedy = Sampling(temperature=0, max_tokens=80)
        async with AsyncClient(served.grpc) as caller:
            called, formed = await asyncio.gather(
                caller.generate(
                    MODEL,
                    messages=QUESTION,
                    tools=[weather],
                    tool_choice="required",
                    parallel_tool_calls=False,
                    sampling=greedy,
                ),
                caller.generate(
                    MODEL, prompt="In JSON:", structured_output=StructuredOutput(json_schema=city), sampling=greedy
                ),
            )
        (call,) = called.tool_calls
        assert (call.name, json.loads(call.arguments), called.text) == ("weather", {"city": "Paris"}, "")
        assert called.outputs[0].finish_reason == "tool_calls"
        assert json.loads(formed.text) == {"city": "Paris"}

    @pytest.mark.parametrize(
        ("kwargs", "error", "says"),
        [
            ({"model": "nope", "prompt": "x"}, errors.UnknownModel, "nope"),
            ({"model": MODEL, "prompt": "word " * 5000}, errors.InvalidInput, "2048"),
            ({"model": MODEL, "prompt": ""}, errors.InvalidInput, "prompt"),
            ({"model": MODEL, "token_ids": [10**9]}, errors.InvalidInput, "1000000000"),
        ],
    )
    def test_bad_input(self, served: Served, kwargs: dict[str, Any], error: type[Exception], says: str) -> None:
        with Client(served.grpc) as caller, pytest.raises(error, match=says):
            caller.generate(**kwargs, timeout_s=30)

    def test_bad_sampling_over_the_wire(self, served: Served) -> None:
        from hycluster.ingress.proto import inference_pb2, inference_pb2_grpc

        request = inference_pb2.GenerateRequest(model=MODEL, prompt="x")
        request.sampling.max_tokens = 0
        with grpc.insecure_channel(served.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
            inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=30)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "max_tokens" in (caught.value.details() or "")


def busy(model: str) -> bool:
    return any(r.load.running and r.load.kv_usage > 0 for r in replicas(model))


LONG = Sampling(max_tokens=1900, ignore_eos=True, temperature=0)


class TestCancellation:
    """A caller that is gone frees its KV blocks."""

    def test_http_client_hangs_up(self, served: Served) -> None:
        body = {"model": MODEL, "prompt": "go on", "max_tokens": 1900, "ignore_eos": True, "stream": True}

        def hang_up() -> None:
            with httpx.stream("POST", f"{served.http}/v1/completions", json=body, timeout=60) as answer:
                # Kept: httpx closes the connection when the iterator is thrown away.
                lines = answer.iter_lines()
                next(lines)
                eventually(lambda: busy(MODEL), 60, "the engine works on it")

        frees_soon(hang_up, MODEL)

    def test_http_client_hangs_up_without_streaming(self, served: Served) -> None:
        body = {"model": MODEL, "prompt": "go on", "max_tokens": 1900, "ignore_eos": True}

        def hang_up() -> None:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{served.http}/v1/completions", json=body, timeout=1.5)

        frees_soon(hang_up, MODEL)

    def test_grpc_client_cancels(self, served: Served) -> None:
        with Client(served.grpc) as caller:

            def hang_up() -> None:
                stream = caller.stream(model=MODEL, prompt="go on", sampling=LONG)
                next(stream)
                eventually(lambda: busy(MODEL), 60, "the engine works on it")
                stream.close()

            frees_soon(hang_up, MODEL)

    def test_grpc_deadline(self, served: Served) -> None:
        with Client(served.grpc) as caller:

            def be_late() -> None:
                with pytest.raises(errors.DeadlineExceeded):
                    caller.generate(model=MODEL, prompt="go on", sampling=LONG, timeout_s=1.5)

            frees_soon(be_late, MODEL)


async def test_online_goes_before_batch(served: Served) -> None:
    """Four slots, forty batch requests in the queue: one that is online overtakes them."""
    finished: list[str] = []
    async with AsyncClient(served.grpc) as caller:

        async def ask(name: str, priority: Priority) -> None:
            await caller.generate(
                model=TINY, prompt="x", priority=priority, sampling=Sampling(max_tokens=200, ignore_eos=True)
            )
            finished.append(name)

        queued = [asyncio.create_task(ask("batch", Priority.BATCH)) for _ in range(40)]
        await asyncio.sleep(0.3)
        await ask("online", Priority.ONLINE)
        await asyncio.gather(*queued)
    assert finished.index("online") < 20


async def test_streams_are_spread_over_replicas(served: Served) -> None:
    async with AsyncClient(served.grpc) as caller:
        calls = [
            caller.generate(model=SIMULATED, prompt="x" * 50, sampling=Sampling(max_tokens=50, ignore_eos=True))
            for _ in range(32)
        ]
        running = asyncio.gather(*calls)
        seen: dict[str, int] = {}
        while not running.done():
            await asyncio.sleep(0.2)
            for replica in await asyncio.to_thread(replicas, SIMULATED):
                number = replica.load.running + replica.load.waiting
                seen[replica.address.replica_id] = max(seen.get(replica.address.replica_id, 0), number)
        await running
    # Seen at different times, so a stream of the first that ended may be counted with the second's.
    assert len(seen) == 2
    assert all(14 <= most <= 18 for most in seen.values())


async def test_many_streams_at_once_stay_apart(served: Served) -> None:
    """The simulated engine's output is a function of the prompt: nobody may get somebody else's tokens."""
    async with AsyncClient(served.grpc) as caller:

        async def ids(prompt: str) -> list[int]:
            got: list[int] = []
            async for chunk in caller.stream(
                model=SIMULATED, prompt=prompt, sampling=Sampling(max_tokens=8, ignore_eos=True)
            ):
                got += [token for output in chunk.outputs for token in output.token_ids]
            return got

        prompts = [f"prompt number {i}" for i in range(100)]
        alone = await gather_bounded([ids(prompt) for prompt in prompts], limit=1)
        together = await gather_bounded([ids(prompt) for prompt in prompts], limit=100)
    assert together == alone
    assert len({tuple(answer) for answer in alone}) == len(prompts)


def test_the_state_of_the_cluster(served: Served, client: openai.OpenAI) -> None:
    client.completions.create(model=TINY, prompt="a b c", max_tokens=4)
    with httpx.Client(base_url=served.http, timeout=60) as http:

        def all_is_well() -> bool:
            state = http.get("/hycluster/status").raise_for_status().json()
            # Ingress processes tell of their traffic every few seconds.
            return bool(state["state"] == "ready" and state["traffic_by_model"][TINY]["answered"])

        eventually(all_is_well, 60, "all pools are ready, and the traffic is told")
        state = http.get("/hycluster/status").json()
        assert {pool["model"]: len(pool["replicas"]) for pool in state["pools"]} == {
            MODEL: 2, TINY: 1, HUNYUAN: 1, SIMULATED: 2,
        }  # fmt: skip
        assert state["traffic_by_model"][TINY]["ttft_s"]["p50"] > 0
        assert all(replica["most_running"] > 0 for pool in state["pools"] for replica in pool["replicas"])
        page = http.get("/ui").raise_for_status()
        assert all(f">{model}</h2>" in page.text for model in ALL_MODELS)
    command = [sys.executable, "-m", "hycluster", "status", "--address", served.ray]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready  4 of 4 pools well" in done.stdout
    assert "batch executor: 1 of 1 there" in done.stdout
