"""Log-probabilities of sampled tokens and of the likeliest ones, for all rows of a step at once."""

import numpy as np
import torch
from torch import Tensor

from distkv.workers.sampling.sampled_token import TokenLogprobs
from distkv.workers.sampling.softmax import log_softmax


def pack_logprobs(logits: Tensor, tokens: Tensor, count: int) -> Tensor:
    """The numbers of `TokenLogprobs` for each row, with `count` likeliest tokens, at most the whole vocabulary.

    Shapes: logits fp32 `[rows, vocab_size]`, tokens int64 `[rows]`; result int64 `[rows, 2 + 2 * count]`: rank, ids,
    and bits of float64: the token's logprob, those of the ids.
    """
    logprobs = log_softmax(logits)
    own = logprobs.gather(1, tokens[:, None])
    rank = (logprobs > own).sum(-1, keepdim=True) + 1
    # An order without ties, so that neither the algorithm nor `count` has a say: of numbers that are not above 0, those
    # with the smallest bits are the largest.
    keys = logprobs.view(torch.int32).bitwise_and(0x7FFFFFFF).long().bitwise_left_shift_(32)
    keys += torch.arange(logits.shape[1], device=logits.device)
    ids = keys.topk(min(count, logits.shape[1]), largest=False).values.bitwise_and_(0xFFFFFFFF)
    values = torch.cat([own, logprobs.gather(1, ids)], dim=1).double()
    return torch.cat([rank, ids, values.view(torch.int64)], dim=1)


def unpack_logprobs(packed: np.ndarray, counts: list[int]) -> list[TokenLogprobs]:
    """What `pack_logprobs` made, with so many likeliest tokens for each row."""
    most = packed.shape[1] // 2 - 1
    ranks, ids = packed[:, 0].tolist(), packed[:, 1 : 1 + most].tolist()
    values = packed[:, 1 + most :].copy().view(np.float64).tolist()
    return [
        TokenLogprobs(own, rank, list(zip(row_ids[:count], row_values[:count], strict=True)))
        for rank, row_ids, (own, *row_values), count in zip(ranks, ids, values, counts, strict=True)
    ]
