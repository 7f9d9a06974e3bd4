"""Softmax over the vocabulary, of which no row's bits depend on the rows beside it."""

import torch
from torch import Tensor

LINE = 16  # bytes


def softmax(x: Tensor) -> Tensor:
    """Of the rows `[rows, columns]`, in the dtype of x."""
    return torch.softmax(_on_whole_lines(x), dim=-1)[:, : x.shape[1]]


def log_softmax(x: Tensor) -> Tensor:
    """Of the rows `[rows, columns]`, in the dtype of x."""
    return torch.log_softmax(_on_whole_lines(x), dim=-1)[:, : x.shape[1]].contiguous()


def _on_whole_lines(x: Tensor) -> Tensor:
    """x on a CPU. On CUDA with columns of -inf behind the others, so that each row begins at a multiple of LINE bytes:
    it is by where a long row begins that torch shares its columns out to threads, which add them up
    (`cunn_SoftMaxForward`)."""
    columns = LINE // x.element_size()
    missing = -x.shape[1] % columns if x.is_cuda else 0
    return torch.nn.functional.pad(x, (0, missing), value=-torch.inf) if missing else x
