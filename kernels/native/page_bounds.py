"""Upper bounds of a page's scores, see `page_bounds.hpp`."""

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.native.library import DTYPES, Library


def page_bounds(library: Library, q: Tensor, summaries: Tensor, ids: np.ndarray) -> np.ndarray:
    """How high a product of a KV head's queries with a key of a page can be: fp32 `[R, K, P]`, the highest of the
    group's query heads.

    Shapes: q `[R, K * G, D]`, contiguous; summaries `[ids, 2, K, D]` of the same dtype, the least key of each channel
    first; ids int64 `[P]`, of the pages.
    """
    rows, heads, dim = q.shape
    kv_heads = summaries.shape[2]
    assert q.is_contiguous() and summaries.is_contiguous() and q.dtype == summaries.dtype and ids.dtype == np.int64
    ids = np.ascontiguousarray(ids)
    out = np.empty((rows, kv_heads, len(ids)), dtype=np.float32)
    library.page_bounds(
        DTYPES[q.dtype], q.data_ptr(), rows, heads, kv_heads, dim, summaries.data_ptr(), ids.ctypes.data, len(ids),
        out.ctypes.data, torch.get_num_threads(),
    )  # fmt: skip
    return out
