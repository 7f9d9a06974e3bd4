"""How fast products of few rows are, and whether their bits depend on the number of rows. `products.py FILE`."""

import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from probing import Probes, gigabytes, seconds
from torch.nn.functional import linear

SHAPES = {  # outputs and inputs, of Llama-3-8B
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
ROWS = (1, 2, 3, 4, 5, 8, 16, 17, 24, 32, 48, 64, 100, 128, 192, 256, 384, 512, 1000, 1024, 2048)
FLUSH_BYTES = 2**30  # of weights that are read in turn, more than any cache holds


@triton.jit
def _gemv(x, weight, y, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    at = weight + row.to(tl.int64)[:, None] * K + k
    for first in range(0, K, BLOCK):
        total += tl.load(at + first).to(tl.float32) * tl.load(x + first + k).to(tl.float32)
    tl.store(y + row, tl.sum(total, 1).to(tl.bfloat16))


@triton.jit
def _dot(x, y, z, N, K, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """`[M, K] @ [K, N]`, by one product of tiles after the other along K."""
    row, k = tl.arange(0, M), tl.arange(0, BLOCK_K)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        a = tl.load(x + row[:, None] * K + first + k)
        b = tl.load(y + (first + k)[:, None] * N + column)
        total = tl.dot(a, b, total)
    tl.store(z + row[:, None] * N + column, total)


def rows_of_tl_dot(dtype: torch.dtype) -> dict[str, list[str]]:
    """Whether a row's bits are the same in tiles of 16 rows (mma) and of 64 and more (wgmma), with the same K tiles."""
    k_size, n_size = 4096, 512
    answers = {}
    x = torch.randn(256, k_size, device="cuda").to(dtype)
    y = torch.randn(k_size, n_size, device="cuda").to(dtype)
    for block_k in (32, 64, 128):
        results = {}
        for m, warps in ((16, 4), (32, 4), (64, 4), (128, 4), (128, 8)):
            z = torch.empty(m, n_size, device="cuda")
            _dot[(n_size // 64,)](x, y, z, n_size, k_size, M=m, BLOCK_N=64, BLOCK_K=block_k, num_warps=warps)
            results[f"{m} rows, {warps} warps"] = z[:16]
        answers[f"K tiles of {block_k}"] = _alike(results)
    return answers


def rows_of_cublas(library: str, split: bool, n: int, k: int) -> list[str]:
    """Which numbers of rows give the first row the same bits, by a library with or without split-K."""
    settings = torch.backends.cuda.matmul
    try:
        torch.backends.cuda.preferred_blas_library(library)
        settings.allow_bf16_reduced_precision_reduction = (split, split)
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(max(ROWS), k, device="cuda", dtype=torch.bfloat16)
        return _alike({str(rows): linear(x[:rows], weight)[0].clone() for rows in ROWS})
    except RuntimeError as error:  # a library that refuses is an answer too
        return [str(error)]
    finally:  # what comes next is measured as it is without this
        settings.allow_bf16_reduced_precision_reduction = (True, True)
        torch.backends.cuda.preferred_blas_library("default")


def _alike(results: dict[str, torch.Tensor]) -> list[str]:
    """The names of results that are equal in every bit, together."""
    alike: dict[bytes, list[str]] = defaultdict(list)
    for name, result in results.items():
        alike[result.contiguous().view(torch.uint8).cpu().numpy().tobytes()].append(name)
    return [", ".join(names) for names in alike.values()]


def few_rows(n: int, k: int) -> dict[str, float]:
    """GB/s of weights, in a graph over as many as pass any cache: cuBLAS by rows, and a plain kernel for one row."""
    torch.cuda.empty_cache()  # of the weights before
    weights = [
        torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, FLUSH_BYTES // (2 * n * k)))
    ]

    def rate(run: Callable[[torch.Tensor], object]) -> float:
        with torch.cuda.stream(torch.cuda.Stream()):
            run(weights[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in weights:
                run(weight)
        return gigabytes(len(weights) * weights[0].nbytes, seconds(graph.replay, 7))

    found = {}
    for rows in (1, 2, 4, 8):
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        found[f"cuBLAS, {rows}"] = rate(partial(linear, x))
    x, y = torch.randn(k, device="cuda", dtype=torch.bfloat16), torch.empty(n, device="cuda", dtype=torch.bfloat16)
    for rows, block, warps in ((1, 2048, 4), (2, 1024, 4), (4, 512, 4), (8, 512, 8)):
        gemv = partial(_gemv[(n // rows,)], x, y=y, K=k, ROWS=rows, BLOCK=block, num_warps=warps)
        found[f"kernel, {rows} x {block}, {warps} warps"] = rate(gemv)
    expected = linear(x, weights[-1]).float()
    found["error of the kernel"] = ((y.float() - expected).norm() / expected.norm()).item()
    return found


def main() -> None:
    probes = Probes(Path(sys.argv[1]))
    for dtype in (torch.bfloat16, torch.float16):
        probes.ask(partial(rows_of_tl_dot, dtype), f"rows of tl.dot, {dtype}".replace("torch.", ""))
    for library, split in (("cublas", True), ("cublaslt", True), ("cublaslt", False)):  # cuBLAS has no word for it
        for name, (n, k) in SHAPES.items():
            title = f"rows of {library}, {'with' if split else 'without'} split-K, {name}"
            probes.ask(partial(rows_of_cublas, library, split, n, k), title)
    for name, (n, k) in SHAPES.items():
        probes.ask(partial(few_rows, n, k), f"few rows of {name}, GB/s")
    probes.end()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
