"""The groups in which a rank works with others."""

from dataclasses import dataclass, field
from typing import Self

import torch
import torch.distributed as dist

from distkv.workers.group.process_group import PATIENCE, ProcessGroup
from distkv.workers.group.shared_memory import SharedMemory
from distkv.workers.group.stage_link import StageLink
from distkv.workers.group.stage_pulse import num_beats
from distkv.workers.model.layout import Layout


@dataclass(frozen=True)
class Communicators:
    """What a rank exchanges tensors by; that of a rank alone unless others are given."""

    rank: int = 0  # among all of the engine
    stage: ProcessGroup = field(default_factory=ProcessGroup)  # sums, logits, and in the first one what was sampled
    context: ProcessGroup = field(default_factory=ProcessGroup)  # the ranks that share out pages
    link: StageLink | None = None  # to other stages, where there are any
    store: dist.Store | None = None  # where all ranks have met

    @classmethod
    def join(cls, layout: Layout, rank: int, store: dist.Store, backend: str = "gloo", in_order: bool = False) -> Self:
        """Joins all groups of a rank, waiting for all ranks to do so.

        Args:
            store: where they find each other, see `open_store`.
            backend, in_order: see `ProcessGroup`.
        """
        if layout.size == 1:
            return cls()
        dist.init_process_group(backend, store=store, rank=rank, world_size=layout.size, timeout=PATIENCE)
        firsts = range(0, layout.size, layout.tensor_parallel_size)
        stages = [layout.ranks_of_stage(layout.stage(first)) for first in firsts]
        contexts = [layout.context_group(first) for first in range(0, layout.size, layout.decode_context_parallel_size)]
        stage, context = (
            _join_one_of(f"{name} group", groups, rank, store, backend, in_order)
            for name, groups in (("stage", stages), ("context", contexts))
        )
        link = None
        if len(stages) > 1:
            step, last = layout.tensor_parallel_size, len(stages) - 1
            back = dist.new_group(timeout=PATIENCE, backend=backend)
            link = StageLink(
                (rank - step) % layout.size,
                (rank + step) % layout.size,
                backend,
                receives_by=back if layout.stage(rank) == 0 else None,
                sends_by=back if layout.stage(rank) == last else None,
            )
            if backend == "nccl":
                link.try_out(torch.device("cuda", torch.cuda.current_device()), layout.stage(rank) == 0)
        return cls(rank, stage, context, link, store)

    @property
    def progress(self) -> int:
        """Rises while a step goes on, that of other stages included on rank 0; any thread may ask for it."""
        count = self.stage.num_sums
        if self.link is not None:
            count += self.link.num_received
            if self.store is not None and not self.rank:
                count += num_beats(self.store)  # of the stages that it waits for
        return count

    def close(self) -> None:
        """Leaves all groups."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _join_one_of(
    name: str, groups: list[range], rank: int, store: dist.Store, backend: str, in_order: bool
) -> ProcessGroup:
    """The one of these groups that a rank is in; torch wants all ranks to make each of them."""
    if len(groups[0]) == 1:
        return ProcessGroup()
    made = [None] if len(groups) == 1 else [dist.new_group(list(one), PATIENCE, backend) for one in groups]
    number = next(number for number, one in enumerate(groups) if rank in one)
    place, count = groups[number].index(rank), len(groups[number])
    shared = None
    if backend == "gloo":
        shared = SharedMemory.join(dist.PrefixStore(f"{name} {number}", store), place, count)
    return ProcessGroup(place, count, backend, in_order, shared, made[number])
