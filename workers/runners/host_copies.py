"""Small arrays on their way to the device: all that a step sends goes in one block, and nobody waits for it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from distkv.storage.device import Device

Array = TypeVar("Array")
"""What a dataclass holds: `np.ndarray` on the host, `Tensor` once it was sent."""

ARRAYS = (np.ndarray, Tensor)
ALIGNMENT = 2  # words: kernels read addresses that are multiples of 16 bytes
DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.float64): torch.float64}


def send(values: Any, device: Device) -> Any:
    """The same values with a tensor on the device for each array, which is of int64 or float64, see `map_arrays`. All
    of them take one copy, which is ordered by the current stream."""
    arrays: list[np.ndarray] = []
    map_arrays(values, arrays.append)
    if not arrays:
        return values
    spans, size = lay_out(array.size for array in arrays)
    block = device.host_block(size)
    pack(arrays, spans, block)
    sent = block.to(device.torch_device, non_blocking=True)
    tensors = iter([_view(sent[span], array) for array, span in zip(arrays, spans, strict=True)])
    return map_arrays(values, lambda _: next(tensors))


def _view(words: Tensor, array: np.ndarray) -> Tensor:
    """The words of an array as a tensor of its dtype and shape."""
    return words.view(DTYPES[array.dtype]).view(array.shape)


def map_arrays(values: Any, change: Callable[[Any], Any]) -> Any:
    """The same values with each array, or tensor, changed, in the order of fields: in dataclasses and lists of any
    depth. What else they hold stays."""
    if values is None:
        return None
    if isinstance(values, ARRAYS):
        return change(values)
    if isinstance(values, list):
        return [map_arrays(one, change) for one in values]
    if is_dataclass(values):
        return values.__class__(*[map_arrays(one, change) for one in vars(values).values()])
    return values


def lay_out(sizes: Iterable[int]) -> tuple[list[slice], int]:
    """Spans of so many words of 8 bytes each in one block, and the words of the block."""
    spans, end = [], 0
    for size in sizes:
        spans.append(slice(end, end + size))
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return spans, end


def pack(arrays: Iterable[np.ndarray], spans: Sequence[slice], block: Tensor) -> None:
    """Copies each array to the start of its span of a block in CPU memory."""
    words = block.numpy()
    for array, span in zip(arrays, spans, strict=True):
        words[span.start : span.start + array.size] = np.ascontiguousarray(array).reshape(-1).view(np.int64)
