from __future__ import annotations

import random
import sys

import pytest

from hycluster.batch.output.shard_set import PartNames, ShardSet


def test_shards_are_a_set_in_order() -> None:
    numbers = {0, 7, 8, 9, 1000, 64}
    shards = ShardSet(random.sample(sorted(numbers), len(numbers)))
    assert list(shards) == sorted(numbers)
    assert len(shards) == 6
    assert shards == ShardSet(numbers)
    assert 1001 not in shards
    assert 10**9 not in shards
    assert -1 not in shards
    assert list(shards - ShardSet([8, 64, 5])) == [0, 7, 9, 1000]
    shards.discard(7)
    shards.discard(7)
    shards.add(9)
    assert (list(shards), len(shards)) == ([0, 8, 9, 64, 1000], 5)


def test_a_shard_is_no_negative_number() -> None:
    with pytest.raises(ValueError, match="-3"):
        ShardSet([-3])


def test_a_set_of_shards_takes_a_bit_each() -> None:
    shards = ShardSet(range(100_000))
    assert len(shards) == 100_000
    assert sys.getsizeof(shards._bits) < 20_000


def name(shard: int, attempt: int) -> str:
    return f"part-{shard:08d}-{attempt:012x}.parquet"


def test_names_are_known_by_shard_and_attempt() -> None:
    names = PartNames(3)
    names.add(name(0, 0xABC))
    names.add(name(2, 1))
    assert name(0, 0xABC) in names
    assert name(2, 1) in names
    assert name(0, 0xABD) not in names
    assert name(1, 1) not in names
    assert name(1, 0) not in names
    assert "part-2.parquet" not in names


@pytest.mark.parametrize("odd", [name(0, 2), name(1, 0), name(3, 1), name(10**8, 1), "my.parquet", "x/" + name(1, 1)])
def test_names_without_a_place_are_known_all_the_same(odd: str) -> None:
    names = PartNames(3)
    names.add(name(0, 1))
    assert odd not in names
    names.add(odd)
    assert odd in names
    assert name(0, 1) in names


def test_names_take_six_bytes_a_shard() -> None:
    names = PartNames(40_000)
    for shard in range(40_000):
        names.add(name(shard, shard + 1))
    assert all(name(shard, shard + 1) in names for shard in range(0, 40_000, 997))
    assert sys.getsizeof(names._attempts) < 250_000
    assert not names._others
