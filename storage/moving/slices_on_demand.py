"""Streaming on a CPU where a layer's queries say which pages it reads: slices of single KV heads are brought as they
are asked for."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distkv.storage.errors import StoreError
from distkv.storage.meter import now
from distkv.storage.moving.staging_ring import STREAMED, Load, LoadsInTurn, StagingRing
from distkv.storage.pools.host_memory import as_integers
from distkv.storage.tier import Tier, decode_locations

if TYPE_CHECKING:
    from distkv.storage.pools.disk_slices import DiskSlices


class SlicesOnDemand:
    """A `Stream` that also brings what is asked for, into the same buffers: so what either has brought holds until the
    next call of any of the two."""

    def __init__(self, ring: StagingRing, loads: list[Load]):
        """
        Args:
            loads: what `take` gives.
        """
        self._ring = ring
        self._loads = LoadsInTurn(ring, loads) if loads else None
        self.bad_reads: dict[int, str] = {} if self._loads is None else self._loads.bad_reads
        buffer = ring.buffers[0]
        pages, _, kv_heads, page_size, head_dim = buffer.shape
        self._buffer = buffer.view(pages * kv_heads, 2, 1, page_size, head_dim)
        self._slices = as_integers(self._buffer).reshape(pages * kv_heads, 2, page_size * head_dim)
        self._memory = self._slices.reshape(-1).view(np.uint8).data
        # of keys or values of a head each, page_size * head_dim long: by slice and 2; by page, layer, 2 and KV head
        self._rows = self._buffer.view(-1, page_size * head_dim)
        self._host_rows = ring.host.rows().view(-1, page_size * head_dim)
        self._disk: DiskSlices | None = None

    @property
    def capacity(self) -> int:
        """How many slices can be brought at a time."""
        return len(self._buffer)

    def take(self) -> Tensor:
        """See `Stream`."""
        assert self._loads is not None
        return self._loads.take()

    def expect(self, layer: int, locations: np.ndarray, heads: np.ndarray) -> None:
        """Tells that slices are about to be brought, as `bring` has them, however many: they are read from disk side by
        side then."""
        on_disk, slots = decode_locations(locations)
        if on_disk.any():
            self._on_disk().expect(layer, list(zip(slots[on_disk].tolist(), heads[on_disk].tolist(), strict=True)))

    def bring(self, layer: int, locations: np.ndarray, heads: np.ndarray) -> Tensor:
        """The slices of KV heads of cold pages in a layer: `[slices, 2, 1, page_size, head_dim]` on the device.

        Slices that cannot be read back are zeros and noted in `bad_reads`.

        Args:
            locations: see `encode_location`; int64, as many as `heads`, which count on the rank.
        """
        count = len(locations)
        assert count <= self.capacity
        on_disk, slots = decode_locations(locations)
        if not on_disk.all():
            start, brought = now(), np.flatnonzero(~on_disk)
            self._copy(layer, slots[brought], heads[brought], brought)
            self._take_down(Tier.HOST, start, layer, len(brought))
        if on_disk.any():
            start, brought = now(), np.flatnonzero(on_disk)
            wanted = zip(slots[brought].tolist(), heads[brought].tolist(), brought.tolist(), strict=True)
            num_bytes = sum(self._read(layer, slot, head, index) for slot, head, index in wanted)
            self._ring.meter.add("disk_read", start, num_bytes, layer=layer)
            self._take_down(Tier.DISK, start, layer, len(brought))
        return self._buffer[:count]

    def close(self) -> None:
        """See `Stream`."""
        try:
            if self._loads is not None:
                self._loads.close()
        finally:
            if self._disk is not None:
                self._disk.close()

    def _take_down(self, tier: Tier, start: int, layer: int, count: int) -> None:
        self._ring.count_heads(tier, count)
        self._ring.meter.add(STREAMED[tier], start, layer=layer, pages=count)

    def _copy(self, layer: int, slots: np.ndarray, heads: np.ndarray, indexes: np.ndarray) -> None:
        """Brings slices from the host, to where they lie in the buffer: `indexes`, rising."""
        spec = self._ring.spec
        keys = (slots * spec.num_layers + layer) * 2 * spec.num_kv_heads + heads
        source = torch.from_numpy(np.column_stack([keys, keys + spec.num_kv_heads]).reshape(-1))
        count = len(indexes)
        if indexes[-1] == count - 1:  # the first ones
            torch.index_select(self._host_rows, 0, source, out=self._rows[: 2 * count])
        else:
            target = torch.from_numpy(np.column_stack([2 * indexes, 2 * indexes + 1]).reshape(-1))
            self._rows.index_copy_(0, target, self._host_rows.index_select(0, source))

    def _read(self, layer: int, slot: int, head: int, index: int) -> int:
        """Brings a slice from disk; returns the bytes that its file gave."""
        size = 2 * self._slices[index, 0].nbytes
        try:
            return self._on_disk().read(layer, slot, head, self._memory[index * size : (index + 1) * size])
        except StoreError as error:
            self.bad_reads[slot] = str(error)
            self._slices[index] = 0
            return 0

    def _on_disk(self) -> "DiskSlices":
        if self._disk is None:
            from distkv.storage.pools.disk_slices import DiskSlices  # imports zarr

            assert self._ring.disk is not None
            self._disk = DiskSlices(self._ring.disk)
        return self._disk
