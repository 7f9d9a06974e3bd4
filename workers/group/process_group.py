"""Collectives among some of an engine's ranks: those of a stage, or of a context group."""

import os
from collections.abc import Sequence
from datetime import timedelta
from socket import create_server

import torch
import torch.distributed as dist
from torch import Tensor

from distkv.workers.group.shared_memory import SharedMemory

# A rank that waits for a dead one is ended by the group's supervisor, not by this limit.
PATIENCE = timedelta(hours=1)
LOOPBACK = "127.0.0.1"


def open_store(host: str, port: int | None = None) -> dist.TCPStore:
    """Where the ranks of a group find each other: on rank 0 a new one, which has its port from the system and keeps it
    (`store.port`); on the others the one that is there. Who asks at another address of the host finds nobody; where
    that is loopback, gloo keeps to it as well."""
    if host == LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if port is None:
        listener = create_server((host, 0))
        return dist.TCPStore(
            host, listener.getsockname()[1], is_master=True, wait_for_workers=False, timeout=PATIENCE,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
    return dist.TCPStore(host, port, is_master=False, timeout=PATIENCE)


class ProcessGroup:
    """A group of ranks as seen by one of them; a group of one does nothing.

    NCCL carries tensors on CUDA. Those on the CPU go through memory that the ranks of one machine share, else over
    gloo, as do CUDA tensors when ranks share a GPU.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, backend: str = "gloo", in_order: bool = False,
        shared: SharedMemory | None = None, group: dist.ProcessGroup | None = None,
    ):  # fmt: skip
        """
        Args:
            backend: "nccl" or "gloo".
            in_order: whether sums are taken in the order of the ranks on CUDA too.
            shared: what the ranks share, where they lie on one machine.
            group: torch's, of these ranks; None for that of all that have met.
        """
        self.rank = rank
        self.size = size
        self.is_capturable = size == 1 or backend == "nccl"  # whether a CUDA graph may hold its collectives
        self._backend, self._in_order = backend, in_order
        self.num_sums = 0  # that this rank has begun: it goes on as long as there are more of them
        self._shared, self._group = shared, group

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in place. On a CPU, and on CUDA where it was asked for, it is taken in fp32 in
        the order of the ranks, so that an element's bits do not depend on how many elements there are."""
        self.num_sums += 1
        if self.size == 1 or not x.numel():
            return x
        if x.is_cuda and not self._in_order:
            dist.all_reduce(x, group=self._group)
            return x
        own = x.cpu() if self._backend == "gloo" else x  # which gathers in CPU memory alone; there it is x itself
        if self._shared is not None:
            self._shared.all_reduce(own)
            return x if own is x else x.copy_(own)
        total, *others = self._all_gather(own)
        total = total.float()
        for part in others:
            total += part
        return x.copy_(total)

    def sum_parts(self, own: list[Tensor], num_parts: list[int]) -> Tensor:
        """The sum of parts of one shape, of which each rank has so many: in fp32 and in their order, rounded once, as
        `all_reduce` has it where each rank has one."""
        self.num_sums += 1
        parts = own
        if self.size > 1:
            most = max(num_parts)
            given = torch.stack(own + own[:1] * (most - len(own)))
            gathered = self._all_gather(given.cpu() if self._backend == "gloo" else given)
            parts = [gathered[rank][part] for rank, count in enumerate(num_parts) for part in range(count)]
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part
        return total.to(own[0])

    def _all_gather(self, x: Tensor) -> Sequence[Tensor]:
        """What each rank has given as x."""
        if self._shared is not None:
            gathered = self._shared.gather(x, wanted=True)
            assert gathered is not None
            return gathered.unbind()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self._group)
        return parts

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x on all ranks, in place; it has the same shape and dtype on each."""
        if self.size == 1 or not x.numel():
            return x
        if self._shared is None:
            dist.broadcast(x, group=self._group, group_src=0)
        elif (parts := self._shared.gather(x.cpu(), wanted=self.rank > 0)) is not None:
            x.copy_(parts[0])
        return x

    def all_gather(self, x: Tensor) -> Sequence[Tensor]:
        """The x of each rank, all of one shape."""
        if self.size == 1:
            return [x]
        own = x.cpu() if self._backend == "gloo" else x
        return [part.to(x.device) for part in self._all_gather(own)]

    def exchange(self, x: Tensor, sizes: list[int], out: Tensor) -> None:
        """Gives each rank its own part of x, and writes what each rank has for this one into out.

        Shapes: x `[sum(sizes)]`, one rank's part after the other; out `[ranks, sizes[rank]]`; contiguous, of one dtype.
        """
        if x.is_cuda and self._backend == "gloo":  # which has CPU memory alone
            found = torch.empty(out.shape, dtype=out.dtype)
            self.exchange(x.cpu(), sizes, found)
            out.copy_(found)
            return
        if self._shared is not None:
            self._shared.exchange(x, sizes, out)
            return
        of_bytes = [size * x.itemsize for size in sizes]
        received = [of_bytes[self.rank]] * self.size
        dist.all_to_all_single(
            out.view(-1).view(torch.uint8), x.view(torch.uint8), received, of_bytes, group=self._group
        )

    def gather_columns(self, x: Tensor, widths: list[int]) -> Tensor | None:
        """Puts the ranks' columns side by side on rank 0; other ranks get None.

        Shapes: x `[rows, widths[rank]]`, result `[rows, sum(widths)]`.
        """
        if self.size == 1:
            return x
        # gather wants equal shapes, and gloo's wants them in CPU memory
        padded = torch.nn.functional.pad(x, (0, max(widths) - x.shape[1])).contiguous()
        if self._backend == "gloo":
            padded = padded.cpu()
        parts = self._gather(padded)
        if parts is None:
            return None
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1).to(x.device)

    def _gather(self, x: Tensor) -> Sequence[Tensor] | None:
        """What each rank has given as x; None on ranks but the first."""
        if self._shared is not None:
            gathered = self._shared.gather(x, wanted=self.rank == 0)
            return None if gathered is None else gathered.unbind()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, parts, group=self._group, group_dst=0)
        return parts
