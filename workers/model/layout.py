"""How the ranks of an engine share out its model and its KV cache."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Ranks as stages of a pipeline, each a tensor-parallel group: rank r is the `r % tensor_parallel_size`-th of stage
    `r // tensor_parallel_size`. Decode context parallelism adds no ranks: neighbouring ones of a stage are a *context
    group*, which shares out the tokens of its KV heads' pages.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    num_parts: int | None = None  # of a sum over the ranks of a stage, see `Shard.of`; None for one of each rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def stage(self, rank: int) -> int:
        """The stage of a rank."""
        return rank // self.tensor_parallel_size

    def tensor_rank(self, rank: int) -> int:
        """The place of a rank in its stage."""
        return rank % self.tensor_parallel_size

    def ranks_of_stage(self, stage: int) -> range:
        """The ranks of a stage."""
        return range(stage * self.tensor_parallel_size, (stage + 1) * self.tensor_parallel_size)

    def context_group(self, rank: int) -> range:
        """The ranks of the context group that a rank is in."""
        size = self.decode_context_parallel_size
        return range(rank // size * size, (rank // size + 1) * size)
