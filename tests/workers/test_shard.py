"""How a model is cut: everything belongs to exactly one rank, except KV heads that ranks must share."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import TINY

from distkv.errors import ConfigError
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.shard import Shard


def model(kv_heads: int, group: int, intermediate_size: int = 112, vocab_size: int = 128) -> ModelConfig:
    return ModelConfig.from_dict(
        TINY
        | {
            "num_key_value_heads": kv_heads,
            "num_attention_heads": kv_heads * group,
            "head_dim": 16,
            "intermediate_size": intermediate_size,
            "vocab_size": vocab_size,
        }
    )


def assert_partition(ranges: list[tuple[int, int]], total: int) -> None:
    """Neighbouring ranges that cover `0 .. total - 1` once, sizes differing by at most one."""
    assert ranges[0][0] == 0 and ranges[-1][1] == total
    assert all(left[1] == right[0] for left, right in pairwise(ranges))
    sizes = [last - first for first, last in ranges]
    assert min(sizes) >= 0 and max(sizes) - min(sizes) <= 1


@given(st.data(), st.integers(1, 9), st.integers(1, 9))
def test_heads(data: st.DataObject, kv_heads: int, group: int) -> None:
    """Each query head is on one rank, beside its KV head, and the query heads of a rank are equal groups."""
    config = model(kv_heads, group)
    size = data.draw(st.integers(1, kv_heads * group))
    shards = [Shard.of(config, rank, size) for rank in range(size)]
    assert [(shard.rank, shard.size) for shard in shards] == [(rank, size) for rank in range(size)]

    owners = [head for shard in shards for head in range(*shard.query_heads)]
    assert owners == list(range(kv_heads * group))
    assert {head for shard in shards for head in range(*shard.kv_heads)} == set(range(kv_heads))
    for shard in shards:
        queries, kv = list(range(*shard.query_heads)), list(range(*shard.kv_heads))
        assert (shard.num_query_heads, shard.num_kv_heads) == (len(queries), len(kv))
        assert queries and len(queries) % len(kv) == 0
        local_group = len(queries) // len(kv)
        # the kernel takes query head h for a reader of KV head h // group, counted on the rank
        assert [head // group for head in queries] == [kv[i // local_group] for i in range(len(queries))]

    if size <= kv_heads:
        assert_partition([shard.kv_heads for shard in shards], kv_heads)
    else:
        assert all(shard.num_kv_heads == 1 for shard in shards)
        sharers = [sum(shard.kv_heads[0] == head for shard in shards) for head in range(kv_heads)]
        assert max(sharers) - min(sharers) <= 1


@given(st.data(), st.integers(1, 300), st.integers(1, 300))
def test_mlp_and_vocabulary(data: st.DataObject, intermediate_size: int, vocab_size: int) -> None:
    config = model(4, 4, intermediate_size, vocab_size)
    size = data.draw(st.integers(1, 16))
    shards = [Shard.of(config, rank, size) for rank in range(size)]
    assert_partition([shard.mlp for shard in shards], intermediate_size)
    assert_partition([shard.vocab for shard in shards], vocab_size)


def test_smollm2_on_two_ranks() -> None:
    """3 KV heads of 3 query heads each: 2 + 1."""
    first, second = (Shard.of(model(3, 3), rank, 2) for rank in range(2))
    assert (first.kv_heads, first.query_heads) == ((0, 2), (0, 6))
    assert (second.kv_heads, second.query_heads) == ((2, 3), (6, 9))


def test_more_ranks_than_kv_heads() -> None:
    """2 KV heads of 4 query heads each on 3 ranks: two ranks share the first."""
    shards = [Shard.of(model(2, 4), rank, 3) for rank in range(3)]
    assert [shard.kv_heads for shard in shards] == [(0, 1), (0, 1), (1, 2)]
    assert [shard.query_heads for shard in shards] == [(0, 2), (2, 4), (4, 8)]


@pytest.mark.parametrize(("kv_heads", "group", "size"), [(1, 1, 2), (3, 3, 10), (2, 4, 64)])
def test_too_many_ranks(kv_heads: int, group: int, size: int) -> None:
    heads = kv_heads * group
    with pytest.raises(ConfigError, match=f"tensor_parallel_size {size} .* {heads} query heads; use at most {heads}$"):
        Shard.of(model(kv_heads, group), 0, size)
    Shard.of(model(kv_heads, group), heads - 1, heads)
