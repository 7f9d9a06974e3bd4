"""Tokens that a plan refers to by their index among those that the step before sampled, since the leader may not know
them yet."""

import torch
from torch import Tensor


def resolve_placeholders(token_ids: Tensor, sampled: Tensor | None) -> Tensor:
    """The token ids with each placeholder replaced, on the device; int64 `[T]`.

    Args:
        token_ids: int64 `[T]`; negative ones are of `step_plan.placeholder`.
        sampled: what the step before sampled, int64 `[N]` on the same device; None where there are no placeholders.
    """
    if sampled is None:
        return token_ids
    return torch.where(token_ids < 0, sampled.index_select(0, placeholder_index(token_ids).clamp_(min=0)), token_ids)


def placeholder_index(token_ids: Tensor) -> Tensor:
    """The inverse of `step_plan.placeholder`, for each of the token ids that is one."""
    return -1 - token_ids
