"""The names that a gateway gives to a request's blocks are those of vLLM's own ``Request``."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hycluster.engine.protocol import BlockNaming

pytestmark = pytest.mark.usefixtures("vllm_imported")

BLOCK_TOKENS = 16
PROMPT = [random.Random(1).randrange(30000) for _ in range(100)]


def request(**named: Any) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    given: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": PROMPT,
        "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=4),
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**(given | named))


def naming(algorithm: str = "sha256") -> BlockNaming:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils

    kv_cache_utils.init_none_hash(get_hash_fn_by_name(algorithm))
    return BlockNaming(BLOCK_TOKENS, algorithm, kv_cache_utils.NONE_HASH)


def of_vllm(asked: Any, algorithm: str = "sha256", output: tuple[int, ...] = ()) -> list[int]:
    """As an engine has it: of what came by a message."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    came = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(asked))
    hasher = get_request_block_hasher(BLOCK_TOKENS, get_hash_fn_by_name(algorithm))
    made = Request.from_engine_core_request(came, hasher)
    made.append_output_token_ids(list(output))
    return [int.from_bytes(each[-8:], "big") for each in made.block_hashes]


def lora(name: str, path: str) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, 1, path)


def medium(identifier: str, offset: int, length: int) -> Any:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    return MultiModalFeatureSpec(None, "image", identifier, PlaceholderRange(offset=offset, length=length))


def kinds() -> dict[str, dict[str, Any]]:
    media = [medium("first", 3, 20), medium("second", 40, 3), medium("third", 44, 30)]
    return {
        "plain": {},
        "no whole block": {"prompt_token_ids": PROMPT[:15]},
        "one block": {"prompt_token_ids": PROMPT[:16]},
        "salt": {"cache_salt": "salt"},
        "adapter": {"lora_request": lora("a", "/adapters/a")},
        "its path": {"lora_request": lora("a", "/adapters/b")},
        "media": {"mm_features": media},
        "all": {"mm_features": media, "cache_salt": "salt", "lora_request": lora("a", "/adapters/a")},
    }


@pytest.mark.parametrize("kind", sorted(("plain", "no whole block", "one block", "salt", "adapter", "its path", "media",
                                         "all")))  # fmt: skip
@pytest.mark.parametrize("output", [(), tuple(range(40))], ids=["prompt", "output"])
def test_they_are_vllms(kind: str, output: tuple[int, ...]) -> None:
    from hycluster.gateway.block_names import BlockNamer

    asked = request(**kinds()[kind])
    names = BlockNamer().names(asked, naming(), output)
    assert names.tolist() == of_vllm(asked, output=output)
    assert len(names) == (len(asked.prompt_token_ids) + len(output)) // BLOCK_TOKENS


def test_what_is_remembered_is_the_same() -> None:
    """Beginnings that come again, of different kinds in turn."""
    from hycluster.gateway import block_names

    chance, namer, of_engine = random.Random(2), block_names.BlockNamer(), naming()
    long = [chance.randrange(30000) for _ in range(4000)]
    for turn in range(40):
        tokens = long[: chance.randrange(900, 4000)] + [turn] * 20
        more = chance.choice([*kinds().values()])
        asked = request(**(more | {"prompt_token_ids": tokens}))
        assert namer.names(asked, of_engine).tolist() == of_vllm(asked)
        assert namer.names(asked, of_engine, [1] * 1100).tolist() == of_vllm(asked, output=(1,) * 1100)


def test_each_kind_has_its_own() -> None:
    from hycluster.gateway.block_names import BlockNamer

    firsts = [names[0] for each in kinds().values() if len(names := BlockNamer().names(request(**each), naming()))]
    # One block is a beginning of the plain one.
    assert len(set(firsts)) == len(firsts) - 1


@pytest.mark.parametrize("algorithm", ["sha256_cbor", "xxhash"])
def test_other_hashes_go_by_the_engines_root(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of xxhash is another one in each process; the engine says it."""
    from vllm.v1.core import kv_cache_utils

    from hycluster.gateway.block_names import BlockNamer

    if algorithm == "xxhash":
        pytest.importorskip("xxhash")
    of_engine = naming(algorithm)
    expected = of_vllm(request(), algorithm)
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", b"of this process")
    assert BlockNamer().names(request(), of_engine).tolist() == expected
    naming()


def test_prompts_of_embeddings_have_none() -> None:
    import torch

    from hycluster.gateway.block_names import BlockNamer

    assert not len(BlockNamer().names(request(prompt_token_ids=None, prompt_embeds=torch.zeros(40, 8)), naming()))


def test_who_looks_for_blocks() -> None:
    from vllm.sampling_params import SamplingParams

    from hycluster.gateway.block_names import reads_cache

    assert reads_cache(request())
    assert not reads_cache(request(sampling_params=SamplingParams(prompt_logprobs=1)))
    assert not reads_cache(request(sampling_params=SamplingParams(skip_reading_prefix_cache=True)))
