"""Speculative decoding through the pool: fewer steps, the same tokens, and the acceptance in the metrics."""

from __future__ import annotations

import httpx
import pytest

from tests.integration.conftest import eventually
from tests.integration.featured import DRAFTED, TINY, Featured

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def complete(ingress: httpx.Client, model: str) -> list[int]:
    # A prompt that repeats itself, so that looking it up has something to find.
    body = {"model": model, "prompt": "to be or not to be, " * 8, "temperature": 0, "max_tokens": 48}
    answer = ingress.post("/v1/completions", json=body | {"ignore_eos": True, "return_token_ids": True})
    ids: list[int] = answer.raise_for_status().json()["choices"][0]["token_ids"]
    return ids


@pytest.mark.parametrize("model", DRAFTED)
def test_greedy_tokens_are_the_same_and_some_were_accepted(featured: Featured, model: str) -> None:
    with httpx.Client(base_url=featured.served.http, timeout=120) as ingress:
        assert complete(ingress, model) == complete(ingress, TINY)

        def counted() -> list[float]:
            found = {
                line.split("{")[0]: float(line.rsplit(" ", 1)[1])
                for line in ingress.get("/metrics").text.splitlines()
                if line.startswith("vllm:spec_decode") and f'model_name="{model}"' in line
            }
            return [found.get(f"vllm:spec_decode_num_{kind}_tokens_total", 0) for kind in ("draft", "accepted")]

        # The replica says so with its next report.
        drafted, accepted = eventually(lambda: (found := counted()) and all(found) and found, 60, "some were accepted")
    assert accepted <= drafted
    if model == "draft":
        # It drafts for itself.
        assert accepted == drafted
