"""Pages that are hard to encode, and their bits."""

import torch
from support.prompts import seeded
from torch import Tensor

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def some_pages(seed: int, dtype: torch.dtype, page_size: int, head_dim: int, *shape: int, size: float = 1.0) -> Tensor:
    """`[*shape, 2, 2, page_size, head_dim]`: channels of very different sizes, far from 0, equal to each other, 0."""
    generator = seeded(seed)

    def numbers(*last: int) -> Tensor:
        return torch.randn(*shape, 2, 2, *last, generator=generator)

    pages = numbers(page_size, head_dim) * numbers(1, head_dim).mul(2).exp() + 8 * numbers(1, head_dim)
    pages[..., 1] = pages[..., :1, 1]  # a channel of one value
    pages[..., 2, :] = 0  # a token of zeros
    pages[..., 0, 3] *= 1000  # one outlier
    return (pages * size).clamp(-6e4, 6e4).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.view(BITS[x.dtype])
