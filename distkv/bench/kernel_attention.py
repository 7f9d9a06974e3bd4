"""Rows of `distkv bench kernels` about attention over pages, beside torch's own over keys and values that lie in one
piece.

Dims: B sequences, T tokens, H query heads, K KV heads, S page_size, D head_dim.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distkv.bench.device import MatmulCeiling, MemoryCeiling, Turns, Work
from distkv.bench.kernel_work import AttentionShape
from distkv.errors import DistKVError
from distkv.storage.device import device_of
from distkv.storage.paging import pages_for
from distkv.workers.attention.cuda import CudaAttention, CudaShape, plan_cuda_attention
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.cuda_runner import decode_programs
from distkv.workers.runners.host_copies import send

SPARE_BYTES = 2**31  # for states, and for what is gathered on the way

# Of the norm of the result: two to three times what rounding makes of random keys and values.
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def decode_row(turns: Turns, memory: MemoryCeiling, shape: AttentionShape, batch: int, context: int) -> dict[str, Any]:
    """Decode attention of one new token for each of `batch` sequences of `context` tokens, splits and merge together,
    beside a large read and one of its own pages in one piece.

    Raises DistKVError when the result is not torch's.
    """
    device, num_pages = turns.device, pages_for(context, shape.page_size)
    pool, table = random_pool(shape, batch * num_pages, device)
    pages = table.view(batch, num_pages).cpu().numpy()
    attention = resident(shape, [SequenceStep([0], context - 1, mine, context, 1) for mine in pages], turns)
    q = torch.randn(batch, shape.query_heads, shape.head_dim, device=device).to(shape.dtype)

    def kernel() -> Tensor:
        return attention.attend(q, q, q, pool, None).view_as(q)

    # as many bytes as there are: a read that takes no longer than the kernel begins and ends as slowly as it does
    works: dict[str, Work] = {"kernel": kernel, "read": memory.read, "own read": pool.view(torch.float32).sum}
    num_bytes = shape.kv_bytes(batch * context)
    peer = None
    if turns.meter.free_bytes() > num_bytes + SPARE_BYTES:
        k, v = contiguous(shape, pool, table.view(batch, num_pages), context)
        peer = works["torch"] = lambda: torch_attention(q[:, :, None], k, v, causal=False)
    seconds = turns.seconds(works)
    error = None if peer is None else compare(f"decode of {batch} x {context} tokens", kernel(), peer()[:, :, 0])
    rate, read_rate = num_bytes / seconds["kernel"].median, memory.read_bytes / seconds["read"].median
    own_rate = pool.nbytes / seconds["own read"].median
    return {
        "part": "decode",
        "batch": batch,
        "context": context,
        "kv_bytes": num_bytes,
        "ms": seconds["kernel"].scaled(1e3),
        "bytes_per_s": rate,
        "torch_bytes_per_s": None if peer is None else num_bytes / seconds["torch"].median,
        "read_bytes_per_s": read_rate,
        "share": rate / read_rate,
        "own_read_bytes_per_s": own_rate,
        "own_share": rate / own_rate,
        "error": error,
    }


def prefill_row(turns: Turns, matmul: MatmulCeiling, shape: AttentionShape, num_tokens: int) -> dict[str, Any]:
    """Causal attention of a prompt of `num_tokens` tokens in one chunk.

    Raises DistKVError when the result is not torch's.
    """
    device, heads = turns.device, (shape.query_heads, shape.head_dim)
    pool, table = random_pool(shape, pages_for(num_tokens, shape.page_size), device)
    q = torch.randn(num_tokens, *heads, device=device).to(shape.dtype)
    attention = resident(shape, [SequenceStep([0] * num_tokens, 0, table.cpu().numpy(), num_tokens, 1)], turns)
    k, v = contiguous(shape, pool, table[None], num_tokens)
    rows = q.transpose(0, 1)[None].contiguous()

    def kernel() -> Tensor:
        return attention.attend(q, q, q, pool, None).view_as(q)

    def peer() -> Tensor:
        return torch_attention(rows, k, v, causal=True)

    works: dict[str, Work] = {"kernel": kernel, "matmul": matmul.run, "torch": peer}
    seconds = turns.seconds(works)
    error = compare(f"prefill of {num_tokens} tokens", kernel(), peer()[0].transpose(0, 1))
    flops, ceiling = shape.prefill_flops(num_tokens), matmul.flops / seconds["matmul"].median
    return {
        "part": "prefill",
        "tokens": num_tokens,
        "flops": flops,
        "ms": seconds["kernel"].scaled(1e3),
        "flops_per_s": flops / seconds["kernel"].median,
        "torch_flops_per_s": flops / seconds["torch"].median,
        "matmul_flops_per_s": ceiling,
        "share": flops / seconds["kernel"].median / ceiling,
        "error": error,
    }


def resident(shape: AttentionShape, steps: list[SequenceStep], turns: Turns) -> CudaAttention:
    """The attention of a step whose pages are all in the pool, as the engine runs it."""
    group = shape.query_heads, shape.kv_heads, shape.head_dim, shape.page_size
    num_programs = decode_programs(turns.meter.processors, shape.kv_heads)
    cut = CudaShape(*group, 0, shape.dtype, num_programs)
    plan = plan_cuda_attention(steps, cut)
    return CudaAttention(plan, cut, send(plan.arrays, device_of(turns.device)))


def random_pool(shape: AttentionShape, num_pages: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A layer's pool `[2, num_pages, K, S, D]` of random keys and values, and a table of all its pages in any order."""
    size = 2, num_pages, shape.kv_heads, shape.page_size, shape.head_dim
    return torch.empty(size, dtype=shape.dtype, device=device).normal_(), torch.randperm(num_pages, device=device)


def contiguous(shape: AttentionShape, pool: Tensor, tables: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, K, num_tokens, D]` of the sequences whose pages are the rows of `tables`."""
    size = len(tables), shape.kv_heads, num_tokens, shape.head_dim
    k, v = (torch.empty(size, dtype=shape.dtype, device=pool.device) for _ in range(2))
    for sequence, table in enumerate(tables):
        for part, target in zip(pool, (k, v), strict=True):
            target[sequence] = part[table].transpose(0, 1).flatten(1, 2)[:, :num_tokens]
    return k, v


def torch_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's own, on CUDA by its flash backend. Shapes: q `[B, H, queries, D]`, k and v `[B, K, keys, D]`."""
    backend = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else nullcontext()
    with backend:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def compare(name: str, result: Tensor, expected: Tensor) -> float:
    """The relative error in the Euclidean norm; raises DistKVError when rounding does not explain it."""
    error = ((result.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error < TOLERANCES[result.dtype]:
        raise DistKVError(f"{name} differs from torch's attention by {error:.2g} of its norm; report it")
    return error
