"""The arithmetic of page sizes, apart from the tensors so that options can be checked without torch."""

import math

from distkv.storage.errors import ConfigError

MIN_PAGE_SIZE = 16  # tokens

# Tokens of prefix that one split of prefill covers on a CPU; a multiple of every page_size up to itself.
PREFILL_SPLIT = 2048

# Tokens that one split of decode covers on CUDA, or a page where that is larger.
DECODE_SPLIT = 256

# Buffers of a staging ring. One is used, the one before it may still be, and two are filled ahead of them, so that
# copies go on while a layer's other work is computed. A CPU fills each when its turn comes, and has CPU_BUFFERS. The
# option `staging_pages` counts the pages of NUM_BUFFERS buffers in any case.
NUM_BUFFERS = 4
CPU_BUFFERS = 2


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that `num_tokens` tokens take, the last one perhaps partly filled."""
    return -(-num_tokens // page_size)


def is_hosts(page: int, share: float) -> bool:
    """Whether a sequence's page, counted from its first one, is of the share that the host attends to: as many as that
    says, spread evenly."""
    return math.floor((page + 1) * share) > math.floor(page * share)


def check_context_page_size(size: int, num_ranks: int) -> None:
    """Raises ConfigError, naming the cure, where so many ranks that share out pages on CUDA have pages that are less
    than a split of decode, of which they would have parts."""
    if num_ranks > 1 and size < DECODE_SPLIT:
        raise ConfigError(
            f"decode_context_parallel_size is {num_ranks} and page_size is {size}, of which a split of decode on CUDA "
            f"has several: use page_size {DECODE_SPLIT} or more, or leave one of them out"
        )


def check_page_size(size: int) -> None:
    """Raises ConfigError, naming a size that works, unless `size` is a power of two >= MIN_PAGE_SIZE."""
    if size < MIN_PAGE_SIZE or size & (size - 1):
        cure = max(MIN_PAGE_SIZE, 1 << max(size - 1, 1).bit_length() - 1)
        raise ConfigError(f"page_size {size} is not a power of two >= {MIN_PAGE_SIZE}; try {cure}")
