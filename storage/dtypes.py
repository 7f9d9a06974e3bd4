"""The dtypes of weights and KV by the names that options and files have for them, so that sizes can be reckoned where
there is no torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
"""What an engine runs in."""

STORED_DTYPES = ("float64", *DTYPES)
"""What a checkpoint may be stored in."""

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number. Those of KV as codes are in `PageSpec.slice_bytes_in`."""


def torch_dtype(name: str) -> "torch.dtype":
    """The dtype of tensors for one of `STORED_DTYPES`."""
    import torch

    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found
