"""How much weight a page is expected to get, by mean keys; see `expected_weights.hpp`."""

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.native.library import DTYPES, Library


def expected_weights(library: Library, q: Tensor, means: Tensor, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The softmax weights of queries over the mean keys of pages, fp32 `[R, K, P]`, summed over the B means of a page
    and the query heads of each KV head. A row's are those over its first `counts` pages, and add up to G; what it has
    of other pages is undefined.

    Shapes: q `[R, K * G, D]`, contiguous; means `[ids, B, K, D]` of the same dtype; ids int64 `[P]`, of the pages;
    counts int64 `[R]`.
    """
    rows, heads, dim = q.shape
    _, blocks, kv_heads, _ = means.shape
    assert q.is_contiguous() and means.is_contiguous() and q.dtype == means.dtype
    assert ids.dtype == counts.dtype == np.int64 and counts.max(initial=0) <= len(ids)
    ids, counts = np.ascontiguousarray(ids), np.ascontiguousarray(counts)
    scores = np.empty((rows, heads, len(ids), blocks), dtype=np.float32)
    out = np.empty((rows, kv_heads, len(ids)), dtype=np.float32)
    library.expected_weights(
        DTYPES[q.dtype], q.data_ptr(), rows, heads, kv_heads, dim, means.data_ptr(), blocks, ids.ctypes.data,
        len(ids), counts.ctypes.data, dim**-0.5, scores.ctypes.data, out.ctypes.data, torch.get_num_threads(),
    )  # fmt: skip
    return out
