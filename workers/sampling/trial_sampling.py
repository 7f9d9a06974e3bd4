"""Samples tokens that nobody reads: what that needs is compiled and loaded, and the memory it takes can be measured."""

from dataclasses import replace

import torch
from torch import Tensor

from distkv.workers.sampling.row_edits import RowEdits, token_bits
from distkv.workers.sampling.sample_row import SampleRow
from distkv.workers.sampling.sampler import sample

TRUNCATED = SampleRow(0, 1.0, 0.9, 50, 0.0, 1.1, 0.1, 0.1, 5, 0.5, [0], [0], pending=0)
"""Takes the most memory, but for what answers with penalties have seen."""


def sample_in_all_ways(logits: Tensor) -> None:
    """Samples from fp32 logits `[rows, vocab_size]` in each way in turn; waits for the device."""
    sampled = torch.zeros(1, dtype=torch.int64, device=logits.device)
    edits = RowEdits({0: 1.0}, [0], [(0, 0)], token_bits([0, 1], logits.shape[1]))
    truncated = replace(TRUNCATED, edits=edits)
    plain = replace(truncated, top_p=1.0, top_k=0)
    for row in (truncated, plain, replace(plain, temperature=0.0)):
        sample(logits, [replace(row, logits_row=number) for number in range(len(logits))], sampled).result()
