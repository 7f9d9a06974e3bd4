"""How a model is cut: everything belongs to exactly one rank, except KV heads that ranks must share."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import TINY

from distkv.errors import ConfigError
from distkv.workers.model.layout import Layout
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
    shards = [Shard.of(config, Layout(size), rank) for rank in range(size)]
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
    shards = [Shard.of(config, Layout(size), rank) for rank in range(size)]
    assert_partition([shard.mlp for shard in shards], intermediate_size)
    assert_partition([shard.vocab for shard in shards], vocab_size)


def test_smollm2_on_two_ranks() -> None:
    """3 KV heads of 3 query heads each: 2 + 1."""
    first, second = (Shard.of(model(3, 3), Layout(2), rank) for rank in range(2))
    assert (first.kv_heads, first.query_heads) == ((0, 2), (0, 6))
    assert (second.kv_heads, second.query_heads) == ((2, 3), (6, 9))


def test_more_ranks_than_kv_heads() -> None:
    """2 KV heads of 4 query heads each on 3 ranks: two ranks share the first."""
    shards = [Shard.of(model(2, 4), Layout(3), rank) for rank in range(3)]
    assert [shard.kv_heads for shard in shards] == [(0, 1), (0, 1), (1, 2)]
    assert [shard.query_heads for shard in shards] == [(0, 2), (2, 4), (4, 8)]


@pytest.mark.parametrize(("kv_heads", "group", "size"), [(1, 1, 2), (3, 3, 10), (2, 4, 64)])
def test_too_many_ranks(kv_heads: int, group: int, size: int) -> None:
    heads = kv_heads * group
    with pytest.raises(ConfigError, match=f"tensor_parallel_size {size} .* {heads} query heads; use at most {heads}$"):
        Shard.of(model(kv_heads, group), Layout(size), 0)
    Shard.of(model(kv_heads, group), Layout(heads), heads - 1)


@given(st.integers(1, 9), st.integers(1, 3), st.data())
def test_stages_have_neighbouring_layers(num_layers: int, size: int, data: st.DataObject) -> None:
    """As many as may be each, and the ranks of each stage cut its layers as those of one stage cut all."""
    config = replace(model(3, 2), num_hidden_layers=num_layers)
    stages = data.draw(st.integers(1, num_layers))
    layout = Layout(size, stages)
    shards = [Shard.of(config, layout, rank) for rank in range(layout.size)]
    assert [(shard.stage, shard.rank) for shard in shards] == [(s, r) for s in range(stages) for r in range(size)]
    layers = [shard.layers for shard in shards[::size]]
    assert_partition(layers, num_layers)
    assert [last - first for first, last in layers] == sorted(
        (shard.num_layers for shard in shards[::size]), reverse=True
    )
    alone = [Shard.of(config, Layout(size), rank) for rank in range(size)]
    for shard in shards:
        one = alone[shard.rank]
        assert shard == replace(one, layout=layout, stage=shard.stage, layers=shard.layers)


def test_too_many_stages() -> None:
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size 3 is more than the model's 2 layers; .* at most 2$"):
        Shard.of(replace(model(2, 2), num_hidden_layers=2), Layout(1, 3), 0)


@pytest.mark.parametrize(
    "kv_heads, group, size, context_size",
    [(3, 3, 2, 2), (3, 2, 6, 2), (2, 4, 8, 4), (2, 4, 8, 8), (4, 2, 4, 2), (1, 8, 4, 4), (3, 3, 3, 3)],
)
def test_context_groups_have_whole_heads(kv_heads: int, group: int, size: int, context_size: int) -> None:
    """All ranks of a group have its KV heads; the rest of what they have is as without groups."""
    config = model(kv_heads, group)
    layout = Layout(size, decode_context_parallel_size=context_size)
    shards = [Shard.of(config, layout, rank) for rank in range(size)]
    assert [shard.context_rank for shard in shards] == [rank % context_size for rank in range(size)]
    for rank, shard in enumerate(shards):
        mates = [shards[mate] for mate in layout.context_group(rank)]
        assert {mate.kv_heads for mate in mates} == {shard.kv_heads} and (shard.num_holders, shard.holder) == (1, 0)
        first, last = mates[0].query_heads[0], mates[-1].query_heads[1]
        assert (first, last) == (shard.kv_heads[0] * group, shard.kv_heads[1] * group)
        alone = Shard.of(config, Layout(size), rank)
        assert (shard.query_heads, shard.mlp, shard.vocab, shard.parts) == (
            alone.query_heads, alone.mlp, alone.vocab, alone.parts,
        )  # fmt: skip


@pytest.mark.parametrize(
    "kv_heads, size, context_size, message",
    [
        (3, 6, 4, "4 does not divide it: tensor_parallel_size is 6, .* 3 KV heads; use 1 or 2 or 6$"),
        (1, 4, 2, "2 has no whole KV heads in each group of ranks: .* 1 KV heads; use 1 or 4$"),
        (2, 3, 2, "2 does not divide it: .*; use 1 or 3$"),
    ],
)
def test_context_groups_without_whole_heads_are_refused(
    kv_heads: int, size: int, context_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"decode_context_parallel_size {message}"):
        Shard.of(model(kv_heads, 4), Layout(size, decode_context_parallel_size=context_size), 0)
