from __future__ import annotations

import itertools
import random

import pytest

from hycluster.engine.routed_weights import RoutedWeights, busiest_share, experts_touched

# By name: experts, top-k, ranks that hold whole ones.
HUNYUAN, DEEPSEEK = (16, 1, 8), (256, 8, 8)


def test_experts_touched_are_what_throwing_dice_gives() -> None:
    dice = random.Random(7)
    throws = [len({e for _ in range(12) for e in dice.sample(range(64), 6)}) for _ in range(1000)]
    assert experts_touched(64, 6, 12) == pytest.approx(sum(throws) / len(throws), rel=0.02)
    assert experts_touched(16, 1, 1) == pytest.approx(1)
    assert experts_touched(0, 0, 5) == 0


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16, 40])
@pytest.mark.parametrize(("experts", "top_k", "ranks"), [HUNYUAN, DEEPSEEK], ids=["Hunyuan", "DeepSeek"])
def test_the_busiest_rank_has_what_throwing_dice_gives(experts: int, top_k: int, ranks: int, tokens: int) -> None:
    dice, held, most = random.Random(8), experts // ranks, 0
    for _ in range(400):
        found = {e for _ in range(tokens) for e in dice.sample(range(experts), top_k)}
        most += max(sum(e // held == rank for e in found) for rank in range(ranks))
    assert busiest_share(experts, top_k, tokens, held, ranks) == pytest.approx(most / 400 / held, rel=0.12)


def test_without_ranks_of_their_own_all_gpus_read_alike() -> None:
    assert busiest_share(16, 1, 3, 16, 1) == pytest.approx(experts_touched(16, 1, 3) / 16)
    assert busiest_share(0, 0, 3, 0, 1) == 0


def test_each_token_reads_less_than_the_one_before_it_until_all_are_read() -> None:
    weights = RoutedWeights(16, 1, 16, 1, 0.9)
    touched = [weights.touched(tokens) for tokens in range(300)]
    assert touched[:2] == [0, pytest.approx(1 / 16)]
    assert touched[-1] == 1.0
    more = [after - before for before, after in itertools.pairwise(touched)]
    assert all(0 <= after <= before for before, after in itertools.pairwise(more[:140]))
