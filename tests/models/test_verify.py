"""Cuts over pipeline stages that would part layers that share keys and values."""

from __future__ import annotations

import pytest
from vllm import envs

from hycluster.models.configuration import HunyuanConfig
from hycluster.models.verify import aligned_partition, check_pipeline_cut


@pytest.fixture(autouse=True)
def _environment_is_read() -> None:
    """An engine that another test has started in this process has vLLM keep what it read of the environment."""
    envs.disable_envs_cache()


def config(layers: int, share: int) -> HunyuanConfig:
    return HunyuanConfig(num_hidden_layers=layers, use_cla=share > 1, cla_share_factor=share)


@pytest.mark.parametrize(("layers", "share", "stages"), [(64, 2, 1), (64, 2, 2), (64, 2, 4), (9, 1, 2), (8, 4, 2)])
def test_cuts_between_groups_pass(layers: int, share: int, stages: int) -> None:
    check_pipeline_cut(config(layers, share), stages)


def test_a_cut_through_a_group_is_refused_with_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="pipeline_parallel_size: 3 cuts the 64 layers at layer 21") as refused:
        check_pipeline_cut(config(64, 2), 3)
    assert "VLLM_PP_LAYER_PARTITION=22,22,20" in str(refused.value)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "22,22,20")
    check_pipeline_cut(config(64, 2), 3)


def test_a_partition_of_the_users_own_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "31,33")
    with pytest.raises(ValueError, match="cuts the 64 layers at layer 31"):
        check_pipeline_cut(config(64, 2), 2)


@pytest.mark.parametrize(("layers", "share", "stages"), [(64, 2, 3), (64, 2, 5), (63, 2, 4), (32, 4, 3)])
def test_aligned_partitions_are_whole(layers: int, share: int, stages: int) -> None:
    counts = aligned_partition(config(layers, share), stages)
    assert sum(counts) == layers
    assert all(count % share == 0 for count in counts[:-1])
    assert max(counts) - min(counts) <= 2 * share
