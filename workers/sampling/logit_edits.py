"""Edits of logits, for all rows of a step at once. None of them looks at another row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from torch import Tensor

from distkv.workers.runners.host_copies import Array
from distkv.workers.sampling.row_edits import WORD_BITS, RowEdits


@dataclass(frozen=True)
class Edits(Generic[Array]):
    """What `edit` needs of a step; a place is row * vocab_size + token id."""

    bias_places: Array  # int64 [B], each once
    biases: Array  # float64 [B]
    forbidden: Array  # int64 [F], places
    forbidden_after: Array  # int64 [A, 3]: place, index among the sampled, the token that this must be
    limited: Array  # int64 [L], rows with `allowed`
    allowed: Array  # int64 [L, words], see `TokenBits`


def edit_arrays(rows: Sequence[tuple[int, RowEdits, int | None]], vocab_size: int) -> Edits[np.ndarray] | None:
    """The edits of rows, each given with its index among the logits and that of its newest token among the sampled,
    where it is pending; grammars are resolved. None without rows."""
    if not rows:
        return None
    biases = [(index * vocab_size + token, bias) for index, row, _ in rows for token, bias in row.biases.items()]
    limited = [(index, row.allowed) for index, row, _ in rows if row.allowed is not None]
    after = [
        (index * vocab_size + token, pending, before)
        for index, row, pending in rows
        for token, before in row.forbidden_after
    ]
    forbidden = [index * vocab_size + token for index, row, _ in rows for token in row.forbidden]
    words = -(-vocab_size // WORD_BITS)
    return Edits(
        bias_places=np.array([place for place, _ in biases], dtype=np.int64),
        biases=np.array([bias for _, bias in biases], dtype=np.float64),
        forbidden=np.array(forbidden, dtype=np.int64),
        forbidden_after=np.array(after, dtype=np.int64).reshape(-1, 3),
        limited=np.array([index for index, _ in limited], dtype=np.int64),
        allowed=np.array([bits for _, bits in limited], dtype="<u8").view(np.int64).reshape(-1, words),
    )


def edit(logits: Tensor, edits: Edits[Tensor], sampled: Tensor | None) -> None:
    """In place: adds biases, and makes what a row may not become -inf.

    Args:
        logits: fp32 `[rows, vocab_size]`, contiguous.
        edits: what `edit_arrays` made, on the device.
        sampled: int64, what the step before sampled; needed for rows whose newest token is pending.
    """
    flat = logits.view(-1)
    if len(edits.biases):
        flat.index_add_(0, edits.bias_places, edits.biases.float())
    if len(edits.forbidden):
        flat.index_fill_(0, edits.forbidden, -torch.inf)
    if len(edits.forbidden_after):
        assert sampled is not None
        places, number, token = edits.forbidden_after.unbind(1)
        most = torch.where(sampled.index_select(0, number) == token, -torch.inf, torch.inf)
        flat.scatter_reduce_(0, places, most, "amin")  # a place may come several times
    if len(edits.limited):
        barred = _members(~edits.allowed, logits.shape[1])
        if len(edits.limited) == len(logits):
            logits.masked_fill_(barred, -torch.inf)
        else:
            own = logits.index_select(0, edits.limited).masked_fill_(barred, -torch.inf)
            logits.index_copy_(0, edits.limited, own)


def _members(bits: Tensor, vocab_size: int) -> Tensor:
    """Sets of tokens `[L, words]` as bool `[L, vocab_size]`."""
    octets = bits.view(torch.uint8)[:, :, None]
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    members = octets.bitwise_and(torch.ones_like(places).bitwise_left_shift_(places)).bool()
    return members.view(len(bits), -1)[:, :vocab_size]
