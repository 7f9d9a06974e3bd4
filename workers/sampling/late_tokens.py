"""Tokens that a plan refers to by their place among the draws of the step before, see `SequencePlan.token_ids`."""

import torch
from torch import Tensor


def resolve(token_ids: Tensor, drawn: Tensor | None) -> Tensor:
    """The token ids with each reference replaced, on the device; int64 `[T]`.

    Args:
        token_ids: int64 `[T]`; `-1 - k` refers to draw k.
        drawn: int64 `[draws]` on the same device; None where there are no references.
    """
    if drawn is None:
        return token_ids
    return torch.where(token_ids < 0, drawn.index_select(0, (-1 - token_ids).clamp_(min=0)), token_ids)
