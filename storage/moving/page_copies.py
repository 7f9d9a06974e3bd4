"""How pages cross between pinned host memory and the device: by the copy engine or by a kernel.

The copy engine takes neighbouring rows together and costs the host a call for each run of them (`row_copies.py`). The
kernel takes them all in one launch, and processors of the GPU from what computes. Which is faster is measured at start,
for each lane by itself (`workers/bandwidth.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from distkv.storage.moving.row_copies import copy_rows
from distkv.storage.moving.streams import Lane, Streams

COPY_PROGRAMS = 16  # of the kernel, each of which takes a processor of the GPU at most

Gather = Callable[[Tensor, Tensor, Tensor, int], None]
"""`kernels.cuda.page_copy.copy_pages`: (source, target, pairs on the device, programs)."""

Run = tuple[int, int, int]
"""Neighbouring rows: the first of the source, the first of the target, how many."""


@dataclass(frozen=True)
class Pairs:
    """Rows to copy, ready for one of the two ways."""

    rows: np.ndarray  # int64 [pairs, 2]: row of the source, row of the target
    on_device: Tensor | None  # the same there, for the kernel
    runs: list[Run]  # for the copy engine


class PageCopies:
    """The copies of a device, on its lanes. Sources and targets are `[row, parts, block]`, the last dim contiguous."""

    def __init__(self, streams: Streams):
        self.streams = streams
        self.kernels: dict[Lane, Gather] = {}  # of the lanes where it is the faster way

    def prepare(self, lane: Lane, rows: Sequence[tuple[int, int]] | np.ndarray, piece_rows: int) -> Pairs:
        """Makes pairs ready for `start` on the lane.

        Args:
            piece_rows: rows of host memory that were pinned together, see `HostBuffer`.
        """
        return self.prepare_parts(lane, np.asarray(rows, dtype=np.int64).reshape(-1, 2), [len(rows)], piece_rows)[0]

    def prepare_parts(self, lane: Lane, rows: np.ndarray, sizes: list[int], piece_rows: int) -> list[Pairs]:
        """The same for parts of so many of the rows `[pairs, 2]` each, one after the other: in one upload."""
        edges = list(pairwise([0, *accumulate(sizes)]))
        if lane in self.kernels:
            uploaded = self.streams.upload(lane, torch.from_numpy(rows)) if len(rows) else None
            return [Pairs(rows[a:b], None if uploaded is None else uploaded[a:b], []) for a, b in edges]
        host = rows[:, 1 if lane is Lane.SPILL else 0]
        starts = np.zeros(len(rows), dtype=bool)  # of runs
        starts[1:] = (np.diff(rows, axis=0) != 1).any(axis=1) | (np.diff(host // piece_rows) != 0)
        starts[[a for a, b in edges if a < b]] = True
        first = np.flatnonzero(starts)
        runs = np.column_stack([rows[first], np.diff(first, append=len(rows))]).tolist()
        cuts = np.searchsorted(first, [0, *accumulate(sizes)]).tolist()
        return [Pairs(rows[a:b], None, runs[c:d]) for (a, b), (c, d) in zip(edges, pairwise(cuts), strict=True)]

    def start(self, lane: Lane, source: Tensor, target: Tensor, pairs: Pairs) -> None:
        """Enqueues `target[b] = source[a]` for each pair (a, b); no row is written twice."""
        if pairs.on_device is not None:
            self.streams.run(lane, partial(self.kernels[lane], source, target, pairs.on_device, COPY_PROGRAMS))
        elif pairs.runs:
            self.streams.run(lane, partial(copy_runs, source, target, pairs.runs))


def copy_runs(source: Tensor, target: Tensor, runs: list[Run]) -> None:
    """Copies runs of rows, part by part, by the copy engine."""
    for part in range(source.shape[1]):
        copy_rows(source[:, part], target[:, part], runs)
