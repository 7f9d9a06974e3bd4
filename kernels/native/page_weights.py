"""Which part of the softmax weight lies on each page, see `page_weights.hpp`."""

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.native.library import Library


def page_weights(library: Library, page_states: Tensor, counts: np.ndarray, group: int) -> np.ndarray:
    """The weight that tokens give to pages, summed over the `group` query heads of a KV head: fp64 `[N, T]`, of which
    the pages that a token has chosen add up to `group`.

    Shapes: page_states fp32 `[N, 1, T * group, 2]`, of `attend_pages`, zeros for tokens that are not there; counts
    int64 `[C]`, how many of the N pages each choice has, one after the other.
    """
    entries, kv_heads, rows, _ = page_states.shape
    assert kv_heads == 1 and page_states.is_contiguous() and counts.dtype == np.int64 and counts.sum() == entries
    counts = np.ascontiguousarray(counts)
    out = np.empty((entries, rows // group))
    library.page_weights(
        page_states.data_ptr(), counts.ctypes.data, len(counts), rows // group, group, out.ctypes.data,
        torch.get_num_threads(),
    )  # fmt: skip
    return out
