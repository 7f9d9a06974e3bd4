"""Log-probabilities of the tokens that a step's prompts go on with, a block of rows at a time."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distkv.storage.device import HostCopy, device_of
from distkv.workers.group.step_plan import SequencePlan
from distkv.workers.runners.host_copies import send
from distkv.workers.sampling.logprobs import pack_logprobs, unpack_logprobs
from distkv.workers.sampling.sampled_token import TokenLogprobs


class PromptScores:
    """The log-probabilities of a step's `SequencePlan.scored`, on their way to the host."""

    def __init__(self, packed: Tensor, counts: list[int]):
        """Takes what `pack_logprobs` made, and how many likeliest tokens each row is to have."""
        self._counts = counts
        self._copy: HostCopy = device_of(packed.device).bring(packed)

    def result(self) -> list[TokenLogprobs]:
        """Waits for them; may be called again. Raises what the device failed with."""
        return unpack_logprobs(self._copy.wait(), self._counts)


def score_prompts(
    plans: list[SequencePlan], hidden: Tensor, make_logits: Callable[[Tensor], Tensor | None], block_rows: int
) -> tuple[PromptScores | None, Tensor]:
    """Takes the rows that are scored out of a step's hidden states; returns the scores, on ranks behind rank 0 None,
    and the other rows. There are never more than `block_rows` rows of logits.

    Args:
        plans: some of which have tokens to be scored.
        hidden: `[rows, E]`, of each sequence the rows behind which a scored token follows, then those of `num_logits`.
        make_logits: makes fp32 logits of hidden states, on ranks behind rank 0 None; all ranks call it alike.
    """
    scored: list[int] = []
    others: list[int] = []
    first = 0
    for one in plans:
        behind = first + len(one.scored)
        scored += range(first, behind)
        others += range(behind, behind + one.num_logits)
        first = behind + one.num_logits
    tokens = [token for one in plans for token in one.scored]
    counts = [one.num_top for one in plans for _ in one.scored]
    arrays = [np.array(one, dtype=np.int64) for one in (scored, others, tokens)]
    scored_rows, other_rows, own = send(arrays, device_of(hidden.device))
    packed = []
    for rows, ids in zip(scored_rows.split(block_rows), own.split(block_rows), strict=True):
        logits = make_logits(hidden[rows])
        if logits is not None:
            packed.append(pack_logprobs(logits, ids, max(counts)))
    return PromptScores(torch.cat(packed), counts) if packed else None, hidden[other_rows]
