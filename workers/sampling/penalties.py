"""Penalties on tokens that an answer has seen, for all rows of a step at once."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class PenalisedRow(Protocol):
    """What a row says about penalties, see `SampleRow`."""

    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    pending: int | None


def penalty_arrays(rows: Sequence[tuple[int, PenalisedRow]], vocab_size: int) -> dict[str, np.ndarray]:
    """What `penalise` needs of rows that have penalties, each with its place among the logits; nothing without rows."""
    if not rows:
        return {}
    seen, times = zip(*(_seen(row) for _, row in rows), strict=True)
    owner = np.repeat(np.arange(len(rows)), [len(tokens) for tokens in seen])
    pending = [(number * vocab_size, row.pending) for number, (_, row) in enumerate(rows) if row.pending is not None]
    return {
        "penalised": np.array([place for place, _ in rows]),
        "penalties": np.array(
            [(row.repetition_penalty, row.presence_penalty, row.frequency_penalty) for _, row in rows]
        ),
        "seen": owner * vocab_size + np.concatenate(seen),
        "times": np.concatenate(times),
    } | ({"pending": np.array(pending)} if pending else {})


def _seen(row: PenalisedRow) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that a row's penalties are about, each once, and how often they are in the output."""
    output, times = np.unique(np.array(row.output_token_ids, dtype=np.int64), return_counts=True)
    prompt = row.prompt_token_ids if row.repetition_penalty != 1 else []
    others = np.setdiff1d(np.array(prompt, dtype=np.int64), output)
    return np.concatenate([output, others]), np.concatenate([times.astype(np.float64), np.zeros(len(others))])


def penalise(logits: Tensor, sent: dict[str, Tensor], sampled: Tensor | None) -> None:
    """In place: repetition penalty on tokens of prompt and output (Keskar et al. 2019,
    https://arxiv.org/abs/1909.05858), presence and frequency penalties on those of the output.

    The newest token may be there twice; it is computed as often, each time from the same numbers.

    Args:
        logits: fp32 `[rows, vocab_size]`, contiguous.
        sent: what `penalty_arrays` made, on the device.
        sampled: of the step before, for rows whose newest token is one of them.
    """
    vocab_size = logits.shape[1]
    seen, times = sent["seen"], sent["times"].float()
    if "pending" in sent:
        assert sampled is not None
        base, number = sent["pending"].unbind(1)
        seen = torch.cat([seen, base + sampled.index_select(0, number)])
        times = torch.cat([times, times.new_ones(len(base))])
    owner = seen // vocab_size
    place = (sent["penalised"].index_select(0, owner) - owner) * vocab_size + seen
    count = times.new_zeros(len(sent["penalised"]) * vocab_size).index_add_(0, seen, times).index_select(0, seen)
    repetition, presence, frequency = sent["penalties"].float().index_select(0, owner).unbind(1)
    flat = logits.view(-1)
    values = flat.index_select(0, place)
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where(count > 0, values - (presence + frequency * count), values)
    flat.index_copy_(0, place, values)
