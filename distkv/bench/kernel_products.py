"""Rows of `distkv bench kernels` about linear layers whose rows do not depend on one another, beside cuBLAS."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distkv.bench.device import Turns
from distkv.errors import DistKVError
from distkv.kernels.cuda.cuda_kernels import BATCH_INVARIANT_KERNELS, CUDA_KERNELS

TOLERANCE = 2e-2  # relative, of two results that are rounded to bfloat16, gated ones of cuBLAS twice


def products(model: dict[str, Any]) -> dict[str, tuple[int, int, bool]]:
    """The linear layers of a model's `config.json`, as `(outputs, inputs, gated)`."""
    hidden, intermediate = model["hidden_size"], model["intermediate_size"]
    head_dim = model.get("head_dim") or hidden // model["num_attention_heads"]
    attended = model["num_attention_heads"] * head_dim
    return {
        "qkv": (attended + 2 * model["num_key_value_heads"] * head_dim, hidden, False),
        "attention out": (hidden, attended, False),
        "gate and up": (2 * intermediate, hidden, True),
        "down": (hidden, intermediate, False),
        "head": (model["vocab_size"], hidden, False),
    }


def product_rows(
    turns: Turns, name: str, outputs: int, depth: int, gated: bool, dtype: torch.dtype, counts: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """One weight with each number of rows of x. Raises DistKVError when the two differ by more than rounding, or when a
    row's bits depend on how many there are."""
    weight = torch.empty(outputs, depth, dtype=dtype, device=turns.device).normal_(0, depth**-0.5)
    x = torch.empty(max(counts), depth, dtype=dtype, device=turns.device).normal_()
    ours, theirs = (
        (kernels.make_gated_linear if gated else kernels.make_linear)(weight)
        for kernels in (BATCH_INVARIANT_KERNELS, CUDA_KERNELS)
    )
    whole = ours(x)
    for rows in counts:
        some = x[:rows]
        found = ours(some)
        _check(name, rows, found, whole[:rows], theirs(some))
        seconds = turns.seconds({"ours": partial(ours, some), "cublas": partial(theirs, some)})
        yield {
            "part": "products",
            "weight": f"{name} {outputs} x {depth}",
            "rows": rows,
            "ms": seconds["ours"].scaled(1e3),
            "bytes_per_s": weight.nbytes / seconds["ours"].median,
            "flops_per_s": 2 * rows * weight.numel() / seconds["ours"].median,
            "cublas_ms": seconds["cublas"].scaled(1e3),
            "share": seconds["cublas"].median / seconds["ours"].median,
        }


def _check(name: str, rows: int, found: Tensor, in_more: Tensor, peer: Tensor) -> None:
    if not torch.equal(found, in_more):
        raise DistKVError(f"{name} of {rows} rows has other bits than among more rows; report it")
    error = ((found.float() - peer.float()).norm() / peer.float().norm()).item()
    if not error < TOLERANCE:
        raise DistKVError(f"{name} of {rows} rows differs from cuBLAS by {error:.2g}; report it")
