"""Makes the summaries of pages while a step runs: of those that it fills, and of those that it meets first."""

import numpy as np
from torch import Tensor

from distkv.kernels.native.codec_pages import NativeCodec
from distkv.storage.moving.slices_on_demand import SlicesOnDemand
from distkv.storage.pools.page_summaries import PageSummaries
from distkv.workers.page_directory import SequenceStep


class Summarising:
    """The work of one step; `fill` comes once for each layer, in their order."""

    def __init__(
        self,
        summaries: PageSummaries,
        steps: list[SequenceStep],
        choosing: list[SequenceStep],
        page_size: int,
        codec: NativeCodec | None = None,
    ):
        """
        Args:
            choosing: those of the steps with tokens that choose by summaries.
            codec: of pages below the device.
        """
        self._summaries, self._codec = summaries, codec
        ids, locations = [], []
        for one in steps:
            filled = slice(one.start // page_size, (one.start + len(one.token_ids)) // page_size)
            ids.append(one.page_ids[filled])
            locations.append(one.pages[filled])
        for one in choosing:
            whole = slice(0, one.start // page_size)
            is_unknown = summaries.unknown(one.page_ids)[whole]
            ids.append(one.page_ids[whole][is_unknown])
            locations.append(one.pages[whole][is_unknown])
        self._ids, first = np.unique(np.concatenate(ids), return_index=True)
        self._locations = np.concatenate(locations)[first]

    def fill(self, layer: int, layer_pool: Tensor, stream: SlicesOnDemand) -> None:
        """Makes the summaries of a layer, whose new keys are in their pages, with the values of their codes if there is
        a codec."""
        resident = self._locations >= 0
        if resident.any():
            self._summaries.put(layer, self._ids[resident], layer_pool[0, self._locations[resident]])
        ids, locations = self._ids[~resident], self._locations[~resident]
        kv_heads = layer_pool.shape[2]
        at_a_time = max(1, stream.capacity // kv_heads)
        for first in range(0, len(ids), at_a_time):
            part = locations[first : first + at_a_time]
            heads = np.tile(np.arange(kv_heads), len(part))
            slices = stream.bring(layer, np.repeat(part, kv_heads), heads)  # [pages * K, 2, 1, S, D], or of codes
            if self._codec is None:
                keys = slices[:, 0, 0]
            else:
                decoded = layer_pool.new_empty(1, 2, len(slices), 1, *layer_pool.shape[3:])
                for index, codes in enumerate(slices):
                    self._codec.decode(codes[None], decoded, index)
                keys = decoded[0, 0, :, 0]
            self._summaries.put(layer, ids[first : first + at_a_time], keys.unflatten(0, (-1, kv_heads)))

    def end(self, stream: SlicesOnDemand) -> None:
        """Takes note that the last layer has ended. Where pages could not be read, what was made of them, or filled
        behind them, is not true; such pages are filled again, or made again when they are met."""
        if not stream.bad_reads:
            self._summaries.complete(self._ids)
