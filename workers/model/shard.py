"""Which part of the model a tensor-parallel rank holds."""

from dataclasses import dataclass

from distkv.workers.errors import ConfigError
from distkv.workers.model.model_config import ModelConfig

RANGES = "query_heads", "kv_heads", "mlp", "vocab"


@dataclass(frozen=True)
class Part:
    """What one term of the sums over ranks is made of, as half-open ranges."""

    query_heads: tuple[int, int]
    mlp: tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """Half-open ranges over the model's heads, MLP columns and vocabulary that belong to one rank.

    KV heads are cut as evenly as whole heads allow, and query heads follow their KV head. With more ranks than KV
    heads, a KV head is held by several ranks, which share out its query heads. Nothing has to divide evenly.

    A sum over ranks has a part of each, rounded by itself. Fewer ranks may take the parts of more, several each, so
    that the sums stay the same bit for bit.
    """

    rank: int
    size: int
    query_heads: tuple[int, int]
    kv_heads: tuple[int, int]
    mlp: tuple[int, int]
    vocab: tuple[int, int]
    num_holders: int  # of the KV heads, this rank included
    holder: int  # this rank's place among them
    num_parts: int  # of a sum, over all ranks
    parts: tuple[Part, ...]  # this rank's, in their order

    @property
    def num_query_heads(self) -> int:
        return self.query_heads[1] - self.query_heads[0]

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads[1] - self.kv_heads[0]

    @classmethod
    def of(cls, model: ModelConfig, rank: int, size: int, num_parts: int | None = None) -> "Shard":
        """What `rank` has among `size` ranks; raises ConfigError when there are more ranks than query heads.

        Args:
            num_parts: of sums, which the ranks share out; one for each unless `merges_parts` allows more.
        """
        if num_parts is None or num_parts == size:
            return cls._of_one_part(model, rank, size)
        first, end = _part(num_parts, rank, size)
        own = [cls._of_one_part(model, part, num_parts) for part in range(first, end)]
        parts = tuple(part for one in own for part in one.parts)
        ranges = {name: (getattr(own[0], name)[0], getattr(own[-1], name)[1]) for name in RANGES}
        return cls(rank, size, **ranges, num_holders=1, holder=0, num_parts=num_parts, parts=parts)

    @classmethod
    def _of_one_part(cls, model: ModelConfig, rank: int, size: int) -> "Shard":
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
        parts = (Part(query, mlp),)
        return cls(rank, size, query, kv, mlp, vocab, len(sharers), sharers.index(rank), size, parts)


def merges_parts(model: ModelConfig, size: int, num_parts: int) -> bool:
    """Whether so many ranks can take the parts of more: each must have whole KV heads, which no other one has."""
    for rank in range(size):
        shard = Shard.of(model, rank, size, num_parts)
        if shard.query_heads != (shard.kv_heads[0] * model.group_size, shard.kv_heads[1] * model.group_size):
            return False
    return True


def _part(total: int, index: int, parts: int) -> tuple[int, int]:
    """The index-th of `parts` neighbouring ranges over `total` things, sizes differing by at most one, larger first."""
    size, larger = divmod(total, parts)
    first = index * size + min(index, larger)
    return first, first + size + (index < larger)
