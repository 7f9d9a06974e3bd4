"""Copies of rows that lie at even distances: on CUDA a call of the copy engine for all of them.

torch copies such rows by way of a hidden buffer, so its runtime is called directly.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

BY_ADDRESS = 4  # cudaMemcpyDefault: where memory lies is told by its address
MAX_PITCH = 2**31 - 1  # bytes from one row to the next, as CUDA takes them


def copy_rows(source: Tensor, target: Tensor, runs: list[tuple[int, int, int]]) -> None:
    """`target[b : b + n] = source[a : a + n]` for each run `(a, b, n)`, on the current stream where one of them is on
    CUDA; the other is there too, or in pinned memory.

    Shapes: source `[rows, block]`, target `[rows, block]` of one dtype, each block contiguous. Raises RuntimeError when
    CUDA takes no such copy.
    """
    if not (source.is_cuda or target.is_cuda):
        for a, b, count in runs:
            target[b : b + count].copy_(source[a : a + count])
        return
    call, stream = _memcpy_2d(), torch.cuda.current_stream().cuda_stream
    width = source.shape[1] * source.element_size()
    pitches = [x.stride(0) * x.element_size() for x in (source, target)]
    if max(pitches) > MAX_PITCH:
        runs = [(a + index, b + index, 1) for a, b, count in runs for index in range(count)]
    first, second = source.data_ptr(), target.data_ptr()
    for a, b, count in runs:
        out, into = first + a * pitches[0], second + b * pitches[1]
        distances = pitches if count > 1 else [width, width]
        error = call(into, distances[1], out, distances[0], width, count, BY_ADDRESS, stream)
        if error:
            raise RuntimeError(f"{count} rows of {width} bytes cannot be copied (CUDA error {error})")


@cache
def _memcpy_2d() -> Callable[..., int]:
    """`cudaMemcpy2DAsync` of the library that torch has loaded: (target, its pitch, source, its pitch, width, rows,
    kind, stream)."""
    assert torch.version.cuda is not None
    call = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}").cudaMemcpy2DAsync
    size, address = ctypes.c_size_t, ctypes.c_void_p
    call.argtypes = [address, size, address, size, size, size, ctypes.c_int, address]
    return call
