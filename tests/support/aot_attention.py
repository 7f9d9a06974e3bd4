"""Launches of the attention kernels at the shapes of real models, with pages as they are or as codes."""

from functools import partial

import torch
from support.aot import Report, meta

from distkv.kernels.codec_format import CodecFormat
from distkv.kernels.cuda.decode import decode_splits
from distkv.kernels.cuda.prefill import BLOCK_M, prefill_walk
from distkv.kernels.cuda.prefill_splits import prefill_splits
from distkv.kernels.cuda.softmax import States


def spills(report: Report) -> int:
    """Loads and stores of local memory. The size of the stack says less: some is reserved and never used."""
    return report.count("LDL") + report.count("STL")


def meta_states(*rows: int, head_dim: int) -> States:
    return States(*(meta(*shape, dtype=torch.float32) for shape in ((*rows, head_dim), rows, rows)))


def meta_buffer(
    dtype: torch.dtype, kv_heads: int, head_dim: int, page_size: int, codec: CodecFormat | None
) -> torch.Tensor:
    """Of the staging ring."""
    if codec is None:
        return meta(16, 2, kv_heads, page_size, head_dim, dtype=dtype)
    row = codec.row_bytes(page_size, head_dim, dtype.itemsize)
    return meta(16, 2, kv_heads, page_size, row, dtype=torch.uint8)


def launch_decode(
    dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, page_size: int, num_tokens: int,
    batch_invariant: bool = False, codec: CodecFormat | None = None,
) -> None:  # fmt: skip
    # as many pages as an H100 has memory for: strides beyond 32 bits
    pool = meta(4, 2, 2**26 // page_size, kv_heads, page_size, head_dim, dtype=dtype)[1]
    heads, rows, states = kv_heads * group, num_tokens * group, 512
    decode_splits(
        meta(8 * num_tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)[:, :heads],
        pool,
        meta_buffer(dtype, kv_heads, head_dim, page_size, codec),
        meta(1000, dtype=torch.int64),
        meta(8, 6, dtype=torch.int64),
        meta(states, 2, dtype=torch.int64),
        meta(1, dtype=torch.int64),
        meta_states(states, kv_heads, rows, head_dim=head_dim),
        num_tokens=num_tokens,
        split_pages=max(1, 256 // page_size),
        num_programs=400,
        batch_invariant=batch_invariant,
        codec=codec,
    )


def launch_prefill(
    dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, page_size: int, split_tokens: int | None = None,
    codec: CodecFormat | None = None,
) -> None:  # fmt: skip
    pool = meta(4, 2, 2**26 // page_size, kv_heads, page_size, head_dim, dtype=dtype)[1]
    heads, tokens = kv_heads * group, 2048
    walk = prefill_walk if split_tokens is None else partial(prefill_splits, split_tokens=split_tokens)
    walk(
        meta(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)[:, :heads],
        pool,
        meta_buffer(dtype, kv_heads, head_dim, page_size, codec),
        meta(1000, dtype=torch.int64),
        meta(4, 8, dtype=torch.int64),
        meta(tokens * group // BLOCK_M, 2, dtype=torch.int64),
        meta_states(tokens, heads, head_dim=head_dim),
        meta(tokens, heads, head_dim, dtype=dtype),
        codec=codec,
        exact=None if codec is None else meta(9, 2, kv_heads, page_size, head_dim, dtype=dtype),
    )
