"""Whatever comes through the HTTP ingress is answered, in time, and by an error of the caller's if it is wrong."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.integration.conftest import SIMULATED, TINY, Served
from tests.integration.fuzzing import BOUND_S, MODELS, check_answer, fuzz, unharmed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
# A right body for each path that takes one.
POSTS: dict[str, dict[str, Any]] = {
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [72, 73]},
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hello", "max_tokens": 4},
    "/v1/responses": {"input": "hello", "max_output_tokens": 4},
    "/v1/messages": CHAT,
    "/v1/messages/count_tokens": {"messages": CHAT["messages"]},
}
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def api(served: Served) -> schemathesis.BaseSchema:
    # Made when it is first asked for.
    return schemathesis.openapi.from_dict(httpx.get(f"{served.http}/openapi.json", timeout=BOUND_S).json())


@pytest.fixture(scope="module")
def ingress(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.http, timeout=BOUND_S) as client, unharmed(served):
        yield client


def test_every_path_is_fuzzed(api: Any) -> None:
    paths = {operation.ok().path for operation in api.get_all_operations() if operation.ok().method == "post"}
    by_id = {"/v1/responses/{response_id}/cancel", "/v1/batches/{batch_id}/cancel"}
    assert paths == {*POSTS, *by_id, "/v1/files", "/v1/batches"}


def bounded(body: Any, path: str) -> Any:
    """Nobody waits for a context full of tokens, nor for beams."""
    if isinstance(body, dict):
        for name in LENGTHS:
            if name in POSTS[path]:
                body.setdefault(name, 4)
            if (isinstance(body.get(name), int) and body[name] > 8) or body.get(name, 0) is None:
                body[name] = 8
    return body


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_bodies_by_the_schema(
    api: schemathesis.BaseSchema, ingress: httpx.Client, path: str, mode: schemathesis.GenerationMode
) -> None:
    """Whole bodies that fit the schema, or just don't; and right ones with a few fields out of such a body."""

    @fuzz
    @given(api[path]["POST"].as_strategy(generation_mode=mode), st.sampled_from(MODELS), st.data())
    def send(case: Any, model: str, data: st.DataObject) -> None:
        body = case.body
        bodies = [body]
        if isinstance(body, dict):
            body |= {"model": model}
            odd = data.draw(st.lists(st.sampled_from(sorted(body)), max_size=3, unique=True))
            bodies.append({"model": model} | POSTS[path] | {name: body[name] for name in odd})
        for asked in bodies:
            text = json.dumps(bounded(asked, path), default=str)
            check_answer(ingress.post(path, content=text, headers=JSON), text)

    send()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/responses/{}", "/v1/responses/{}/cancel", "/v1/batches/{}", "/{}"])
def test_paths_and_queries(ingress: httpx.Client, path: str) -> None:
    @fuzz
    @given(st.text(), st.dictionaries(st.text(), st.text()), st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS"]))
    def send(text: str, query: dict[str, str], method: str) -> None:
        encoded = httpx.QueryParams({"x": text.encode(errors="replace").decode()})
        check_answer(ingress.request(method, path.format(str(encoded)[2:]), params=query), (path, text, query))

    send()


def test_bytes_that_are_no_json(ingress: httpx.Client) -> None:
    whole = json.dumps({"model": SIMULATED, **POSTS["/v1/completions"]}).encode()

    @fuzz
    @given(st.sampled_from([*POSTS, "/v1/batches", "/v1/files"]), st.binary() | st.integers(0, len(whole)), st.binary())
    def send(path: str, start: bytes | int, rest: bytes) -> None:
        body = whole[:start] + rest if isinstance(start, int) else start + rest
        check_answer(ingress.post(path, content=body, headers=JSON), body)

    send()


def value(text: str) -> str:
    """A completion whose ``prompt`` is given as JSON."""
    return f'{{"model": "{TINY}", "max_tokens": 2, "prompt": {text}}}'


def field(text: str) -> str:
    """A completion with a field that is given as JSON."""
    return f'{{"model": "{TINY}", "max_tokens": 2, "prompt": "x", {text}}}'


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/batches"])
@pytest.mark.parametrize(
    "body",
    [
        "[" * 100_000,
        value("[" * 5000 + "]" * 5000),
        value('{"a":' * 5000 + "1" + "}" * 5000),
        value('"\\ud800"'),
        field('"stop": ["\\ud800"]'),
        field('"cache_salt": "\\ud800"'),
        field('"session_id": "\\ud800"'),
        field('"user": "\\ud800"'),
        '{"model": "\\ud800", "prompt": "x"}',
        field('"max_tokens": ' + "1" * 5000),
        field('"max_tokens": ' + "1" * 100),
        field('"temperature": 1e400'),
        field('"temperature": NaN'),
        field('"seed": 18446744073709551616'),
        field('"n": 1000000000'),
        value(json.dumps(["x"] * 2000)),
        value(json.dumps([0] * 100_000)),
        value(json.dumps([2**70])),
        value(json.dumps([[]])),
        field('"stop": ' + json.dumps([f"s{number}" for number in range(10_000)])),
        field('"logit_bias": ' + json.dumps({str(number): 1 for number in range(50_000)})),
        field('"request_id": "' + "x" * 100_000 + '"'),
        field('"vllm_xargs": {"hycluster_migrated": [1, 2]}'),
        field('"vllm_xargs": {"kv_transfer_params": "x"}'),
        field('"kv_transfer_params": {"remote_host": "x"}'),
        field(r'"bad_words": ["\ud800"]'),
        field('"priority": -9223372036854775808'),
        field('"priority": 1e99'),
        field('"structured_outputs": {"grammar": "root ::= root"}'),
        field('"structured_outputs": {"json": {"type": "array", "minItems": 1000000000}}'),
        field('"structured_outputs": {"json": {"$ref": "#"}}'),
        field('"structured_outputs": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}'),
        field('"structured_outputs": {"choice": ' + json.dumps([f"c{number}" for number in range(20_000)]) + "}"),
        field('"structured_outputs": {"regex": "((((" }'),
        field('"use_beam_search": true, "n": 2'),
        field('"prompt_logprobs": 1, "echo": true, "logprobs": 2'),
    ],
    ids=lambda body: body[:60],
)
def test_odd_bodies(ingress: httpx.Client, path: str, body: str) -> None:
    for model in MODELS:
        text = body.replace(TINY, model)
        check_answer(ingress.post(path, content=text, headers=JSON), text)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/json; charset=utf-99"},
        {"content-type": "multipart/form-data"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "\xff\xfe"},
        {"content-type": ""},
        JSON | {"content-encoding": "gzip"},
        JSON | {"x-data-parallel-rank": "99"},
        JSON | {"x-data-parallel-rank": "x"},
        JSON | {"x-request-id": "x" * 10_000},
        JSON | {"x-request-id": "\xe9"},
        JSON | {"x-session-id": "y" * 10_000},
        JSON | {"traceparent": "zz"},
        JSON | {"accept": "\xff"},
        JSON | {"authorization": "Bearer \xff"},
        JSON | {f"x-{number}": "y" for number in range(90)},
        JSON | {"expect": "100-continue"},
        JSON | {"upgrade": "websocket", "connection": "upgrade"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/files", "/v1/batches"])
def test_odd_headers(served: Served, path: str, headers: dict[str, str]) -> None:
    raw = [(name.encode(), text.encode("latin-1")) for name, text in headers.items()]
    body = json.dumps({"model": SIMULATED, "prompt": "x", "max_tokens": 2})
    # A connection each: one that asked for another protocol is of no use to the next.
    check_answer(httpx.post(f"{served.http}{path}", content=body, headers=raw, timeout=BOUND_S), headers)


def test_fields_that_vllm_trips_over(ingress: httpx.Client) -> None:
    refusal = {"type": "refusal", "refusal": "no"}
    said = {"role": "assistant", "type": "message", "id": "m", "status": "completed", "content": [refusal]}
    check_answer(ingress.post("/v1/responses", json={"model": SIMULATED, "input": [said], "max_output_tokens": 4}))


def test_a_form_is_kept_to_whichever_library_takes_it(ingress: httpx.Client) -> None:
    """xgrammar takes the first and the last, and not the other, which llguidance does."""
    for asked, kept in (("[a-c]{3}", "[a-c]{3}"), ("(?i)a{3}", "[aA]{3}"), ("x{3}", "x{3}")):
        body = {"model": TINY, "prompt": "x", "max_tokens": 9, "structured_outputs": {"regex": asked}}
        answer = ingress.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert re.fullmatch(kept, answer.json()["choices"][0]["text"])


def test_a_grammar_that_only_the_engine_refuses_is_the_callers_fault(ingress: httpx.Client) -> None:
    """Two rules that are nothing but each other: all that is tried out before takes them."""
    asked = {"grammar": "root ::= a\na ::= b\nb ::= a"}
    body = {"model": TINY, "prompt": "x", "max_tokens": 9, "structured_outputs": asked}
    answer = ingress.post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"].startswith("structured_outputs: allows nothing")


def test_a_list_of_prompts_counts_as_many(ingress: httpx.Client) -> None:
    body = {"model": SIMULATED, "prompt": ["x"] * 600, "n": 2, "max_tokens": 2}
    answer = ingress.post("/v1/completions", json=body)
    assert (answer.status_code, "at most 1024" in answer.text) == (400, True)
