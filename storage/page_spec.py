"""Shapes and bytes of the pages of a KV cache: the one place that knows them."""

from dataclasses import dataclass
from math import prod

from distkv.kernels.codec_format import FORMATS, LANES, CodecFormat
from distkv.storage.dtypes import ITEM_BYTES
from distkv.storage.errors import ConfigError
from distkv.storage.paging import MIN_PAGE_SIZE, check_page_size, pages_for
from distkv.storage.tier import Tier

MEAN_TOKENS = MIN_PAGE_SIZE
"""Consecutive tokens of a page whose keys have one mean, see `PageSummaries`."""

DISK_CODECS = ("none", "lossless")
"""How pages may be stored on disk, see `storage/disk/disk_codec.py`."""

BLOSC_HEADER_BYTES, CHECKSUM_BYTES, INDEX_ENTRY_BYTES = 16, 4, 16
"""What "lossless" adds to keys or values of a layer which it cannot make smaller, or to an index (a checksum)."""


@dataclass(frozen=True)
class PageSpec:
    """What a page is: `page_size` consecutive tokens of K and V, over all layers.

    One spec describes either the whole model's pages or those of one rank (with that rank's KV heads).
    """

    num_layers: int
    num_kv_heads: int
    page_size: int  # tokens
    head_dim: int
    dtype: str  # a key of `ITEM_BYTES`
    kv_cache_dtype: str = "auto"  # or a key of `FORMATS`: how full pages are rounded, and lie below the device
    disk_codec: str = "none"  # one of `DISK_CODECS`

    def __post_init__(self) -> None:
        check_page_size(self.page_size)
        if self.format is not None and self.head_dim % LANES:
            raise ConfigError(
                f"kv_cache_dtype {self.kv_cache_dtype} needs a head_dim that is a multiple of {LANES}, and the model's "
                f"is {self.head_dim}; leave it out"
            )

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers: `2 * layers * kv_heads * head_dim * bytes`."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def layer_slice_bytes(self) -> int:
        """Bytes of one page's part for one layer as attention reads it."""
        return 2 * self.num_kv_heads * self.page_size * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page as attention reads it."""
        return self.layer_slice_bytes * self.num_layers

    @property
    def summary_bytes(self) -> int:
        """Bytes of the mean keys of a page, see `PageSummaries`."""
        return self.page_bytes // (2 * MEAN_TOKENS)

    def slice_bytes_in(self, tier: Tier) -> int:
        """Bytes that a layer slice takes in a tier, and on the way out of it, which is what streaming moves."""
        if self.format is None or tier is Tier.DEVICE:
            return self.layer_slice_bytes
        return prod(self.stored_slice_shape)

    def page_bytes_in(self, tier: Tier) -> int:
        """Bytes that a page takes in a tier; of one that is compressed the most that it can take."""
        size = self.slice_bytes_in(tier) * self.num_layers
        if tier is Tier.DISK and self.disk_codec == "lossless":
            added = BLOSC_HEADER_BYTES + CHECKSUM_BYTES + INDEX_ENTRY_BYTES
            size += self.num_kv_heads * (2 * self.num_layers * added + CHECKSUM_BYTES)
        return size

    def bytes_per_token_in(self, tier: Tier) -> int:
        """Bytes of a token of a full page over all layers in a tier, and on the way out of it."""
        return self.slice_bytes_in(tier) * self.num_layers // self.page_size

    def route_bytes(self, source: Tier, target: Tier) -> int:
        """Bytes that cross when a page is copied between neighbouring tiers: it has the form of the slower one. Whether
        the disk compresses them does not count."""
        return self.slice_bytes_in(max(source, target)) * self.num_layers

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take, the last one perhaps partly filled."""
        return pages_for(num_tokens, self.page_size)

    @property
    def format(self) -> CodecFormat | None:
        """How pages lie below the device, None where as on it."""
        return FORMATS.get(self.kv_cache_dtype)

    @property
    def stored_slice_shape(self) -> tuple[int, int, int, int]:
        """A layer slice below the device; with a codec `[2, kv_head, page_size, row_bytes]`."""
        if self.format is None:
            return self.slice_shape
        row = self.format.row_bytes(self.page_size, self.head_dim, ITEM_BYTES[self.dtype])
        return 2, self.num_kv_heads, self.page_size, row

    @property
    def stored_dtype(self) -> str:
        """Of the numbers below the device; uint8 with a codec."""
        return self.dtype if self.format is None else "uint8"

    @property
    def slice_shape(self) -> tuple[int, int, int, int]:
        """One page's part for one layer, on the device: `[2, kv_head, page_size, head_dim]`, K first."""
        return 2, self.num_kv_heads, self.page_size, self.head_dim

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """A page below the device: `[layer, 2, kv_head, page_size, head_dim]`, or with bytes of codes as the last."""
        return self.num_layers, *self.stored_slice_shape

    def device_shape(self, num_pages: int) -> tuple[int, int, int, int, int, int]:
        """`[layer, 2, device_page, kv_head, page_size, head_dim]`: all K pages of a layer lie together, so a run of
        neighbouring pages is a view."""
        return self.num_layers, 2, num_pages, self.num_kv_heads, self.page_size, self.head_dim
