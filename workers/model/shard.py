"""Which part of the model a tensor-parallel rank holds."""

from dataclasses import dataclass

from distkv.workers.errors import ConfigError
from distkv.workers.model.model_config import ModelConfig


@dataclass(frozen=True)
class Shard:
    """Half-open ranges over the model's heads, MLP columns and vocabulary that belong to one rank.

    KV heads are cut as evenly as whole heads allow, and query heads follow their KV head. With more ranks than KV
    heads, a KV head is held by several ranks, which share out its query heads. Nothing has to divide evenly.
    """

    rank: int
    size: int
    query_heads: tuple[int, int]
    kv_heads: tuple[int, int]
    mlp: tuple[int, int]
    vocab: tuple[int, int]
    num_holders: int  # of the KV heads, this rank included
    holder: int  # this rank's place among them

    @property
    def num_query_heads(self) -> int:
        return self.query_heads[1] - self.query_heads[0]

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads[1] - self.kv_heads[0]

    @classmethod
    def of(cls, model: ModelConfig, rank: int, size: int) -> "Shard":
        """The part of `rank` among `size` ranks; raises ConfigError when there are more ranks than query heads."""
        if size > model.num_attention_heads:
            raise ConfigError(
                f"tensor_parallel_size {size} is more than the model's {model.num_attention_heads} query heads; "
                f"use at most {model.num_attention_heads}"
            )
        kv_heads, group = model.num_key_value_heads, model.group_size
        if size <= kv_heads:
            kv = _part(kv_heads, rank, size)
            query = kv[0] * group, kv[1] * group
            sharers = [rank]
        else:
            head = rank * kv_heads // size
            sharers = [other for other in range(size) if other * kv_heads // size == head]
            first, last = _part(group, sharers.index(rank), len(sharers))
            kv, query = (head, head + 1), (head * group + first, head * group + last)
        mlp, vocab = _part(model.intermediate_size, rank, size), _part(model.vocab_size, rank, size)
        return cls(rank, size, query, kv, mlp, vocab, len(sharers), sharers.index(rank))


def _part(total: int, index: int, parts: int) -> tuple[int, int]:
    """The index-th of `parts` neighbouring ranges over `total` things, sizes differing by at most one, larger first."""
    size, larger = divmod(total, parts)
    first = index * size + min(index, larger)
    return first, first + size + (index < larger)
