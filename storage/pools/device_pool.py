"""The device tier: the pages that attention can read without moving them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distkv.storage.device import Device
from distkv.storage.dtypes import torch_dtype
from distkv.storage.errors import CapacityError
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.page_pool import PageCodec, check_slot
from distkv.storage.tier import Tier


class DevicePool:
    """A `PagePool` as one tensor of `PageSpec.device_shape` on `device`.

    A slot always holds finite numbers: attention reads whole pages and masks what is not filled, and a masked NaN
    would still spread. Hence `clear` for a slot that changes hands.

    On a GPU whole pages cross by `rows`, in lanes of their own (`copier.py`). With a codec, pages that are stored and
    loaded are codes. Raises CapacityError when the memory cannot be had.
    """

    def __init__(self, spec: PageSpec, num_pages: int, device: Device, codec: PageCodec | None = None):
        self.spec = spec
        self.num_pages = num_pages
        self.device = device
        self.codec = codec
        try:
            self.data = device.zeros(spec.device_shape(num_pages), torch_dtype(spec.dtype))
        except (MemoryError, torch.OutOfMemoryError):
            size, free = num_pages * spec.page_bytes_in(Tier.DEVICE), device.free_bytes()
            raise CapacityError(
                f"the device's KV pages take {size} bytes and {free} are free beside the weights; "
                f"lower device_kv_bytes by {max(0, size - free)} for each rank there"
            ) from None

    def layer(self, index: int) -> Tensor:
        """One layer of the pool: `[2, device_page, kv_head, page_size, head_dim]`, K first."""
        return self.data[index]

    def rows(self) -> Tensor:
        """All pages, not copies: `[page, layer * 2, kv_head * page_size * head_dim]`, the last dim contiguous."""
        return self.data.flatten(0, 1).flatten(2).transpose(0, 1)

    def store(self, slot: int, page: Tensor) -> None:
        check_slot(slot, self.num_pages)
        if self.codec is None:
            self.device.copy(page, self.data[:, :, slot])
        else:
            self.codec.decode(page, self.data, slot)

    def load(self, slot: int, page: Tensor) -> None:
        check_slot(slot, self.num_pages)
        if self.codec is None:
            self.device.copy(self.data[:, :, slot], page)
        else:
            self.codec.encode(self.data, slot, page)

    def clear(self, slots: Sequence[int]) -> None:
        """Fills newly taken slots with zeros, over all layers."""
        for slot in slots:
            self.data[:, :, slot].zero_()

    def copy(self, source: int, target: int) -> None:
        """Copies a whole page to another slot, over all layers."""
        self.data[:, :, target].copy_(self.data[:, :, source])

    def close(self) -> None:
        self.data = self.data[:, :, :0].clone()
