"""With a codec: the pages that choosing tokens fill in a step. They get the values of their codes, while tokens attend
to their own page as it was before."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.native.codec_pages import NativeCodec
from distkv.kernels.native.paged_attention import CodedPages
from distkv.workers.page_directory import SequenceStep


@dataclass(frozen=True)
class FilledPages:
    """Of all sequences of a step."""

    slots: Tensor  # int64 [pages], on the device
    of_rows: np.ndarray  # int64, by choosing row: the index of its own page among these, -1 where it is not full yet

    def round(self, codec: NativeCodec, layer_pool: Tensor) -> CodedPages:
        """Gives them the values of their codes, and returns what they held before, each KV head as a page of its own
        as `ChosenCalls` has them."""
        exact = layer_pool.new_empty(len(self.slots), *layer_pool[:, 0].shape)
        codec.round(layer_pool, self.slots, exact)
        return CodedPages(codec.format, exact.transpose(1, 2).flatten(0, 1)[:, :, None].contiguous())


def plan_filled(choosing: list[tuple[SequenceStep, np.ndarray]], page_size: int) -> FilledPages:
    """For sequences with the positions of their choosing tokens, which are the last ones of their steps."""
    slots: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    of_rows: list[np.ndarray] = []
    num_before = 0
    for one, positions in choosing:
        own, end = positions // page_size, (one.start + len(one.token_ids)) // page_size
        first = int(own[0])
        of_rows.append(np.where(own < end, own - first + num_before, -1))
        slots.append(one.pages[first:end])
        num_before += max(0, end - first)
    return FilledPages(torch.from_numpy(np.concatenate(slots)), np.concatenate(of_rows))
