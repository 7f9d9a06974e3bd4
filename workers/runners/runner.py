"""Which kernels a rank runs its steps with."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from distkv.workers.kv_pools import KVPools
from distkv.workers.model.llama import LlamaModel
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.cpu_runner import CpuRunner


class Runner(Protocol):
    """Runs steps over the pools of a rank."""

    def run(self, steps: list[SequenceStep], sampled: Tensor | None) -> Tensor:
        """The hidden states `[rows, E]` whose logits are wanted, see `LlamaModel.forward`. Waits for nothing on the
        device, but with gloo.

        Args:
            sampled: what the step before sampled, int64 on the device, where token ids refer to it.
        """

    def warm_up(self) -> Iterator[None]:
        """Does what would delay the first steps; yields `num_parts` times. Afterwards device pages hold anything."""

    @property
    def num_parts(self) -> int:
        """See `warm_up`."""


def make_runner(model: LlamaModel, pools: KVPools, max_num_seqs: int, on_cuda: bool) -> Runner:
    """The runner for a kind of device."""
    if not on_cuda:
        return CpuRunner(model, pools)
    from distkv.workers.runners.cuda_runner import CudaRunner  # imports triton

    return CudaRunner(model, pools, max_num_seqs)


def takes_cuda_path(device: torch.device) -> bool:
    """Whether the Triton kernels run. Tests that run them in Triton's interpreter take the place of this."""
    return device.type == "cuda"
