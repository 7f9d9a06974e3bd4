"""The host tier: whole pages in CPU memory, pinned where there is a GPU."""

from torch import Tensor

from distkv.storage.dtypes import torch_dtype
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.host_memory import HostBuffer
from distkv.storage.pools.page_pool import check_slot


class HostPool:
    """Pages `[host_page, layer, 2, kv_head, page_size, head_dim]`: one is one block, and so is a layer slice. What goes
    to another tier, or comes from there, is copied to and from the pages themselves.

    Raises CapacityError when the memory cannot be had.
    """

    def __init__(self, spec: PageSpec, num_pages: int, pinned: bool):
        self.num_pages = num_pages
        self._buffer = HostBuffer((num_pages, *spec.page_shape), torch_dtype(spec.stored_dtype), pinned)
        self.piece_pages = self._buffer.piece_rows  # no copy may reach over a multiple of it

    def page(self, slot: int) -> Tensor:
        """The slot's page itself, not a copy: `[layer, 2, kv_head, page_size, head_dim]`."""
        check_slot(slot, self.num_pages)
        return self._buffer.data[slot]

    def slices(self, first_slot: int, count: int, layer: int) -> Tensor:
        """One layer of neighbouring pages, not a copy: `[count, 2, kv_head, page_size, head_dim]`."""
        check_slot(first_slot, self.num_pages)
        check_slot(first_slot + count - 1, self.num_pages)
        return self._buffer.data[first_slot : first_slot + count, layer]

    def rows(self) -> Tensor:
        """All pages, not copies: `[page, layer * 2, kv_head * page_size * head_dim]`, contiguous."""
        return self._buffer.data.flatten(1, 2).flatten(2)

    def layer_rows(self, layer: int) -> Tensor:
        """One layer of all pages, not a copy: `[page, 1, 2 * kv_head * page_size * head_dim]`, the last dim
        contiguous."""
        return self._buffer.data[:, layer].flatten(1)[:, None]

    def close(self) -> None:
        self._buffer.close()
        self.num_pages = 0
