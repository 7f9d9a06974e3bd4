"""What the pools above and below the host's can do, whose pages are copied to and from host memory."""

from typing import Protocol, runtime_checkable

from torch import Tensor


class PagePool(Protocol):
    """`num_pages` slots of whole pages, each of `PageSpec.page_shape` and `stored_dtype`.

    Each method takes a slot from 0 to `num_pages - 1` and raises IndexError for any other. Pages passed in and out lie
    in host memory. What was never stored reads as anything at all, or as an error.
    """

    num_pages: int

    def store(self, slot: int, page: Tensor) -> None:
        """Copies a page `[layer, 2, kv_head, page_size, head_dim]` into the slot."""

    def load(self, slot: int, page: Tensor) -> None:
        """Copies the slot's content into `page`, of the same shape. Raises StoreError when it cannot be read back."""

    def close(self) -> None:
        """Gives back what the pool holds."""


class PageCodec(Protocol):
    """Pages of a pool `[layers, 2, slots, K, S, D]` on the device, or of one layer of it, as codes `[layers, 2, K, S,
    row_bytes]` below it, see `kernels/codec_format.py`."""

    def encode(self, pool: Tensor, slot: int, codes: Tensor) -> None:
        """Writes the page in a slot as codes."""

    def decode(self, codes: Tensor, pool: Tensor, slot: int) -> None:
        """Writes codes as a page into a slot."""

    def round(self, layer_pool: Tensor, slots: Tensor) -> None:
        """Gives the pages in some slots of a layer the values of their codes."""


@runtime_checkable
class RowCodec(PageCodec, Protocol):
    """One whose pages cross between host and GPU by kernels: each method is a `Gather` of `page_copies.py`."""

    def encode_rows(self, source: Tensor, target: Tensor, pairs: Tensor, num_programs: int) -> None:
        """From `DevicePool.rows` to `HostPool.rows`."""

    def decode_rows(self, source: Tensor, target: Tensor, pairs: Tensor, num_programs: int) -> None:
        """The inverse."""


def check_slot(slot: int, num_pages: int) -> None:
    """Raises IndexError for a slot outside the pool."""
    if not 0 <= slot < num_pages:
        raise IndexError(f"slot {slot} is outside a pool of {num_pages} pages")
