"""Which part of the model a rank holds."""

from dataclasses import dataclass, replace
from functools import lru_cache

from distkv.workers.errors import ConfigError
from distkv.workers.model.layout import Layout
from distkv.workers.model.model_config import ModelConfig


@dataclass(frozen=True)
class Part:
    """What one term of the sums over ranks is made of, as half-open ranges."""

    query_heads: tuple[int, int]
    mlp: tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """Half-open ranges over the model's layers, heads, MLP columns and vocabulary that belong to one rank.

    A stage of the pipeline has some of the layers, and its ranks cut those: KV heads as evenly as whole heads allow,
    and query heads follow their KV head. With more ranks than KV heads, a KV head is held by several ranks, which share
    out its query heads. Nothing has to divide evenly. The embedding and the head belong to the first stage.

    A sum over the ranks of a stage has a part of each, rounded by itself. Fewer ranks may take the parts of more,
    several each, so that the sums stay the same bit for bit.

    The ranks of a context group have the same KV heads, all those of their query heads, and each keeps the pages of its
    own tokens. All else is as without such groups.
    """

    layout: Layout
    stage: int
    rank: int  # among those of the stage
    layers: tuple[int, int]
    query_heads: tuple[int, int]
    kv_heads: tuple[int, int]
    mlp: tuple[int, int]
    vocab: tuple[int, int]
    num_holders: int  # of the KV heads of the same tokens, this rank included
    holder: int  # this rank's place among them
    parts: tuple[Part, ...]  # of a sum, this rank's, in their order

    @property
    def size(self) -> int:
        """The ranks of the stage."""
        return self.layout.tensor_parallel_size

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.layout.pipeline_parallel_size - 1

    @property
    def context_size(self) -> int:
        """The ranks of the context group."""
        return self.layout.decode_context_parallel_size

    @property
    def context_rank(self) -> int:
        """This rank's place in the context group."""
        return self.rank % self.context_size

    @property
    def num_layers(self) -> int:
        return self.layers[1] - self.layers[0]

    @property
    def num_query_heads(self) -> int:
        return self.query_heads[1] - self.query_heads[0]

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads[1] - self.kv_heads[0]

    @classmethod
    def of(cls, model: ModelConfig, layout: Layout, rank: int) -> "Shard":
        """What a rank has. Where `Layout.num_parts` is another number than that of the ranks of a stage, these share
        out so many parts; `merges_parts` says whether they can.

        Raises ConfigError when a stage has more ranks than the model has query heads, when there are more stages than
        layers, and when context groups would not have whole KV heads.
        """
        stages, num_layers = layout.pipeline_parallel_size, model.num_hidden_layers
        if stages > num_layers:
            raise ConfigError(
                f"pipeline_parallel_size {stages} is more than the model's {num_layers} layers; use at most "
                f"{num_layers}"
            )
        stage, tensor_rank = layout.stage(rank), layout.tensor_rank(rank)
        own = _own_cuts(model, layout, tensor_rank)
        if layout.decode_context_parallel_size > 1:
            _check_context_groups(model, layout)
        holds_alone = len(own) > 1 or layout.decode_context_parallel_size > 1
        return cls(
            layout=layout,
            stage=stage,
            rank=tensor_rank,
            layers=_part(num_layers, stage, stages),
            query_heads=(own[0].part.query_heads[0], own[-1].part.query_heads[1]),
            kv_heads=_heads_of_context_group(model, layout, tensor_rank)[1],
            mlp=(own[0].part.mlp[0], own[-1].part.mlp[1]),
            vocab=(own[0].vocab[0], own[-1].vocab[1]),
            num_holders=1 if holds_alone else own[0].num_holders,
            holder=0 if holds_alone else own[0].holder,
            parts=tuple(one.part for one in own),
        )


@dataclass(frozen=True)
class _Cut:
    """What one of so many ranks would have that take a part each."""

    part: Part
    kv_heads: tuple[int, int]
    vocab: tuple[int, int]
    num_holders: int
    holder: int

    @classmethod
    def of(cls, model: ModelConfig, index: int, count: int) -> "_Cut":
        if count > model.num_attention_heads:
            raise ConfigError(
                f"tensor_parallel_size {count} is more than the model's {model.num_attention_heads} query heads; "
                f"use at most {model.num_attention_heads}"
            )
        kv_heads, group = model.num_key_value_heads, model.group_size
        if count <= kv_heads:
            kv = _part(kv_heads, index, count)
            query = kv[0] * group, kv[1] * group
            sharers = [index]
        else:
            head = index * kv_heads // count
            sharers = [other for other in range(count) if other * kv_heads // count == head]
            first, last = _part(group, sharers.index(index), len(sharers))
            kv, query = (head, head + 1), (head * group + first, head * group + last)
        part = Part(query, _part(model.intermediate_size, index, count))
        return cls(part, kv, _part(model.vocab_size, index, count), len(sharers), sharers.index(index))


def merges_parts(model: ModelConfig, size: int, num_parts: int) -> bool:
    """Whether so many ranks can take the parts of more: each must have whole KV heads, which no other one has."""
    layout = Layout(size, num_parts=num_parts)
    return all(_are_whole(model, *_heads(model, layout, range(rank, rank + 1))) for rank in range(size))


def _own_cuts(model: ModelConfig, layout: Layout, tensor_rank: int) -> list[_Cut]:
    """Those whose parts a rank takes, in their order."""
    size = layout.tensor_parallel_size
    num_parts = layout.num_parts or size
    return [_Cut.of(model, index, num_parts) for index in range(*_part(num_parts, tensor_rank, size))]


def _heads(model: ModelConfig, layout: Layout, ranks: range) -> tuple[tuple[int, int], tuple[int, int]]:
    """The query heads and the KV heads that neighbouring ranks of a stage have together."""
    first, last = _own_cuts(model, layout, ranks[0])[0], _own_cuts(model, layout, ranks[-1])[-1]
    query = first.part.query_heads[0], last.part.query_heads[1]
    return query, (first.kv_heads[0], last.kv_heads[1])


def _heads_of_context_group(
    model: ModelConfig, layout: Layout, tensor_rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    return _heads(model, layout, layout.context_group(tensor_rank))


def _are_whole(model: ModelConfig, query_heads: tuple[int, int], kv_heads: tuple[int, int]) -> bool:
    """Whether these are all query heads of the KV heads."""
    return query_heads == (kv_heads[0] * model.group_size, kv_heads[1] * model.group_size)


@lru_cache(maxsize=2**7)  # of all ranks of a group
def _check_context_groups(model: ModelConfig, layout: Layout) -> None:
    """Raises ConfigError unless the ranks of a stage are context groups with whole KV heads."""
    size, asked = layout.tensor_parallel_size, layout.decode_context_parallel_size

    def can_be(context_size: int) -> bool:
        one = replace(layout, decode_context_parallel_size=context_size)
        firsts = range(0, size, context_size)
        return all(_are_whole(model, *_heads_of_context_group(model, one, first)) for first in firsts)

    allowed = [one for one in range(1, size + 1) if not size % one and (one == 1 or can_be(one))]
    if asked not in allowed:
        why = "does not divide it" if size % asked else "has no whole KV heads in each group of ranks"
        raise ConfigError(
            f"decode_context_parallel_size {asked} {why}: tensor_parallel_size is {size}, and the model has "
            f"{model.num_key_value_heads} KV heads; use {' or '.join(map(str, allowed))}"
        )


def _part(total: int, index: int, parts: int) -> tuple[int, int]:
    """The index-th of `parts` neighbouring ranges over `total` things, sizes differing by at most one, larger first."""
    size, larger = divmod(total, parts)
    first = index * size + min(index, larger)
    return first, first + size + (index < larger)
