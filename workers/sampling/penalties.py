"""Penalties on tokens that an answer has seen, for all rows of a step at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol

import numpy as np
import torch
from torch import Tensor

from distkv.workers.runners.host_copies import Array


class PenalisedRow(Protocol):
    """What a row says about penalties, see `SampleRow`."""

    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    pending: int | None


@dataclass(frozen=True)
class Penalties(Generic[Array]):
    """What `penalise` needs of R rows that have penalties, which have seen S tokens together."""

    rows: Array  # int64 [R], of the logits
    factors: Array  # float64 [R, 3]: repetition, presence, frequency
    seen: Array  # int64 [S]: number of the row, of R, * vocab_size + token id; each once
    times: Array  # float64 [S], how often it is in the output
    pending: Array | None  # int64 [N, 2]: number of the row * vocab_size, index of its newest token among the sampled


def penalty_arrays(rows: Sequence[tuple[int, PenalisedRow]], vocab_size: int) -> Penalties[np.ndarray] | None:
    """The penalties of rows, each given with its index among the logits; None without rows."""
    if not rows:
        return None
    seen, times = zip(*(_seen(row) for _, row in rows), strict=True)
    owner = np.repeat(np.arange(len(rows)), [len(tokens) for tokens in seen])
    pending = [(number * vocab_size, row.pending) for number, (_, row) in enumerate(rows) if row.pending is not None]
    return Penalties(
        rows=np.array([index for index, _ in rows]),
        factors=np.array([(row.repetition_penalty, row.presence_penalty, row.frequency_penalty) for _, row in rows]),
        seen=owner * vocab_size + np.concatenate(seen),
        times=np.concatenate(times),
        pending=np.array(pending) if pending else None,
    )


def _seen(row: PenalisedRow) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that a row's penalties are about, each once, and how often they are in the output."""
    output, times = np.unique(np.array(row.output_token_ids, dtype=np.int64), return_counts=True)
    prompt = row.prompt_token_ids if row.repetition_penalty != 1 else []
    others = np.setdiff1d(np.array(prompt, dtype=np.int64), output)
    return np.concatenate([output, others]), np.concatenate([times.astype(np.float64), np.zeros(len(others))])


def penalise(logits: Tensor, penalties: Penalties[Tensor], sampled: Tensor | None) -> None:
    """In place: repetition penalty on tokens of prompt and output (Keskar et al. 2019,
    https://arxiv.org/abs/1909.05858), presence and frequency penalties on those of the output.

    The newest token may be there twice; it is computed as often, each time from the same numbers.

    Args:
        logits: fp32 `[rows, vocab_size]`, contiguous.
        penalties: what `penalty_arrays` made, on the device.
        sampled: int64, what the step before sampled; needed for rows whose newest token is pending.
    """
    vocab_size = logits.shape[1]
    seen, times = penalties.seen, penalties.times.float()
    if penalties.pending is not None:
        assert sampled is not None
        base, number = penalties.pending.unbind(1)
        seen = torch.cat([seen, base + sampled.index_select(0, number)])
        times = torch.cat([times, times.new_ones(len(base))])
    owner = seen // vocab_size
    index = (penalties.rows.index_select(0, owner) - owner) * vocab_size + seen
    count = times.new_zeros(len(penalties.rows) * vocab_size).index_add_(0, seen, times).index_select(0, seen)
    repetition, presence, frequency = penalties.factors.float().index_select(0, owner).unbind(1)
    flat = logits.view(-1)
    values = flat.index_select(0, index)
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where(count > 0, values - (presence + frequency * count), values)
    flat.index_copy_(0, index, values)
