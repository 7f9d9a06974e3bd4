"""The device tier: the pages that attention can read without moving them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distkv.storage.page_spec import PageSpec


class DevicePool:
    """`num_pages` page slots on `device`, as one tensor of `PageSpec.device_shape`.

    A slot always holds finite numbers: attention reads whole pages and masks what is not filled, and a masked NaN
    would still spread. Hence `clear` for a slot that changes hands.
    """

    def __init__(self, spec: PageSpec, num_pages: int, device: torch.device):
        self.spec = spec
        self.num_pages = num_pages
        shape = spec.device_shape(num_pages)
        if device.type == "cpu":
            # numpy's zeros are memory that the system maps on first touch; torch's are written at once
            blank = np.zeros(shape, dtype=np.dtype(f"i{spec.dtype.itemsize}"))
            self.data = torch.from_numpy(blank).view(spec.dtype)
        else:
            self.data = torch.zeros(shape, dtype=spec.dtype, device=device)

    def layer(self, index: int) -> Tensor:
        """One layer of the pool: `[2, device_page, kv_head, page_size, head_dim]`, K first."""
        return self.data[index]

    def clear(self, slots: Sequence[int]) -> None:
        """Fills newly taken slots with zeros, over all layers."""
        for slot in slots:
            self.data[:, :, slot].zero_()

    def copy(self, source: int, target: int) -> None:
        """Copies a whole page to another slot, over all layers."""
        self.data[:, :, target].copy_(self.data[:, :, source])
