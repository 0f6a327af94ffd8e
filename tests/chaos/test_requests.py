from __future__ import annotations

from hycluster.chaos.requests import Mix, requests


def test_the_seed_settles_them() -> None:
    assert requests(Mix(seed=1, count=50)) == requests(Mix(seed=1, count=50))
    assert requests(Mix(seed=1, count=50)) != requests(Mix(seed=2, count=50))
    # A shorter run asks the first of the same.
    assert requests(Mix(seed=1, count=50))[:10] == requests(Mix(seed=1, count=10))


def test_all_sorts_are_there() -> None:
    asked = requests(Mix(seed=0, count=300, prompt_tokens=(10, 200), output_tokens=(5, 50), tokens_a_word=2.0))
    assert {request.ingress for request in asked} == {"http", "grpc"}
    assert {request.chat for request in asked} == {True, False}
    greedy = [request for request in asked if request.sampling.temperature == 0]
    unseeded = [request for request in asked if not request.exact]
    assert 120 < len(greedy) < 180
    assert 25 < len(unseeded) < 65
    # vLLM refuses n > 1 with greedy sampling.
    assert all(request.sampling.n == 1 for request in greedy)
    assert any(request.sampling.n == 2 for request in asked)
    assert any(request.sampling.stop for request in asked)
    assert any(request.sampling.logprobs for request in asked)
    assert len({request.prompt for request in asked}) == 300
    lengths = [len(request.prompt.split()) for request in asked]
    assert 5 <= min(lengths) < 15
    assert 80 < max(lengths) <= 100
    outputs = [request.sampling.max_tokens or 0 for request in asked]
    assert min(outputs) == 5
    assert 45 < max(outputs) <= 50


def test_what_is_left_out_changes_nothing_else() -> None:
    everything, plain = (requests(Mix(seed=0, count=100, features=some)) for some in (("n", "logprobs", "stop"), ()))
    assert [request.prompt for request in everything] == [request.prompt for request in plain]
    assert [request.sampling.seed for request in everything] == [request.sampling.seed for request in plain]
    assert all((r.sampling.n, r.sampling.logprobs, r.sampling.stop) == (1, None, ()) for r in plain)


def test_a_request_says_what_it_is() -> None:
    (asked,) = requests(Mix(seed=0, count=1, output_tokens=(9, 9)))
    assert str(asked).startswith("request 0 (http, ")
    assert str(asked).endswith("at most 9 tokens)")
