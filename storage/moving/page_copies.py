"""How pages cross between pinned host memory and the device: by the copy engine or by a kernel.

The copy engine takes contiguous pieces one by one, since torch copies anything else by way of a hidden buffer, and
costs the host a call for each. The kernel takes them all in one launch, and processors of the GPU from what computes.
Which is faster is measured at start, for each lane by itself (`workers/bandwidth.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distkv.storage.moving.streams import Lane, Streams

COPY_PROGRAMS = 16  # of the kernel, each of which takes a processor of the GPU at most

Gather = Callable[[Tensor, Tensor, Tensor, int], None]
"""`kernels.cuda.page_copy.copy_pages`: (source, target, pairs on the device, programs)."""


@dataclass(frozen=True)
class Pairs:
    """Rows to copy, as (row of the source, row of the target); int64 `[pairs, 2]` on the device too for the kernel."""

    rows: list[tuple[int, int]]
    on_device: Tensor | None

    def part(self, first: int, last: int) -> "Pairs":
        on_device = None if self.on_device is None else self.on_device[first:last]
        return Pairs(self.rows[first:last], on_device)


class PageCopies:
    """The copies of a device, on its lanes. Sources and targets are `[row, parts, block]`, the last dim contiguous."""

    def __init__(self, streams: Streams):
        self.streams = streams
        self.kernels: dict[Lane, Gather] = {}  # of the lanes where it is the faster way

    def prepare(self, lane: Lane, rows: list[tuple[int, int]]) -> Pairs:
        """Makes pairs ready for `start` on the lane: once for many copies, since it may cost an upload."""
        wants_upload = lane in self.kernels and rows
        return Pairs(rows, self.streams.upload(lane, torch.tensor(rows)) if wants_upload else None)

    def start(self, lane: Lane, source: Tensor, target: Tensor, pairs: Pairs) -> None:
        """Enqueues `target[b] = source[a]` for each pair (a, b); no row is written twice."""
        if not pairs.rows:
            return
        if pairs.on_device is not None:
            work = partial(self.kernels[lane], source, target, pairs.on_device, COPY_PROGRAMS)
        else:
            work = partial(copy_pieces, source, target, pairs.rows)
        self.streams.run(lane, work)


def copy_pieces(source: Tensor, target: Tensor, rows: list[tuple[int, int]]) -> None:
    """Copies contiguous pieces one by one, so that each is a plain asynchronous copy between pinned memory and GPU."""
    for part in range(source.shape[1]):
        sources, targets = source[:, part], target[:, part]
        for a, b in rows:
            targets[b].copy_(sources[a], non_blocking=True)
