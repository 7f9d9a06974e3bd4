"""Pages as codes by the native kernels of a CPU, see `codecs.hpp`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distkv.kernels.codec_format import CodecFormat
from distkv.kernels.native.library import DTYPES, Library


@dataclass(frozen=True)
class NativeCodec:
    """Encodes and decodes pages, bit for bit as `page_codec.py`.

    Shapes: pools are contiguous `[layers, 2, slots, K, S, D]` or one layer of that, K first; codes are contiguous uint8
    `[layers, 2, K, S, row_bytes]`.
    """

    library: Library
    format: CodecFormat

    def encode(self, pool: Tensor, slot: int, codes: Tensor) -> None:
        """Writes the page in a slot as codes, on the thread that calls."""
        assert codes.is_contiguous()
        self.library.encode_page(*self._pages(pool), slot, codes.data_ptr())

    def decode(self, codes: Tensor, pool: Tensor, slot: int) -> None:
        """The inverse of `encode`."""
        assert codes.is_contiguous()
        dtype, number, address, *shape = self._pages(pool)
        self.library.decode_page(dtype, number, codes.data_ptr(), *shape, slot, address)

    def round(self, layer_pool: Tensor, slots: Tensor, exact: Tensor | None = None) -> None:
        """Gives the pages in some slots of a layer `[2, slots, K, S, D]` the values of their codes.

        Args:
            slots: int64 `[n]`.
            exact: `[n, 2, K, S, D]`, is given what they held before.
        """
        if not len(slots):
            return
        self.library.round_pages(
            *self._pages(layer_pool), slots.data_ptr(), len(slots), None if exact is None else exact.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip

    def _pages(self, pool: Tensor) -> tuple[int, ...]:
        assert pool.is_contiguous()
        return DTYPES[pool.dtype], self.format.number, pool.data_ptr(), *pool.flatten(0, -5).shape
