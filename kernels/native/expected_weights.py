"""How much weight a page is expected to get, by mean keys; see `expected_weights.hpp`."""

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.native.library import DTYPES, Library

MOST_SCORES = 2**24
"""Of query heads with mean keys, that are held at a time where more than one row has them: 64 MiB."""


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
    out = np.empty((rows, kv_heads, len(ids)), dtype=np.float32)
    at_a_time = max(1, min(rows, MOST_SCORES // max(1, heads * len(ids) * blocks)))
    scores = np.empty((at_a_time, heads, len(ids), blocks), dtype=np.float32)
    for first in range(0, rows, at_a_time):
        part = slice(first, first + at_a_time)
        library.expected_weights(
            DTYPES[q.dtype], q[part].data_ptr(), len(q[part]), heads, kv_heads, dim, means.data_ptr(), blocks,
            ids.ctypes.data, len(ids), counts[part].ctypes.data, dim**-0.5, scores.ctypes.data, out[part].ctypes.data,
            torch.get_num_threads(),
        )  # fmt: skip
    return out
