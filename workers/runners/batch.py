"""Turns the sequences of a step into the tensors that all layers share.

Dims: T tokens of the step, H query heads, K KV heads, S page_size, D head_dim.
"""

from dataclasses import dataclass
from typing import Generic, Protocol

import numpy as np
from torch import Tensor

from distkv.storage.moving.staging_ring import Load, Stream
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.host_copies import Array

# Sequences with at most this many new tokens take the decode path, which reads each page once for all of them.
MAX_DECODE_TOKENS = 8


class Attention(Protocol):
    """How a step attends to its pages, by one kind of kernels."""

    @property
    def loads(self) -> list[Load]:
        """What `attend` takes from the stream in each layer."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_pool: Tensor, stream: Stream | None) -> Tensor:
        """Attention of all new tokens of one layer, whose keys and values are already in their pages.

        Shapes: q `[T, H, D]`; k, v `[T, K, D]`; layer_pool `[2, pages, K, S, D]`; `stream` gives `loads`, None when
        there are none. Returns `[T, H * D]`.
        """


@dataclass(frozen=True)
class Tokens(Generic[Array]):
    """The tokens of a step; all int64."""

    token_ids: Array  # [T]
    positions: Array  # [T]
    context: Array  # [T], see RotaryEmbedding.angles
    page: Array  # [T], device slot of each token's page, -1 for padding and where another rank has it
    offset: Array  # [T], index in that page
    logit_rows: Array  # rows of the step whose logits are wanted


@dataclass(frozen=True)
class Batch:
    """A step, ready to run."""

    tokens: Tokens[Tensor]
    attention: Attention


def step_tokens(
    steps: list[SequenceStep], page_size: int, context_rank: int = 0, context_size: int = 1
) -> Tokens[np.ndarray]:
    """The tokens of all sequences, one sequence after the other.

    Args:
        page_size: of this rank; those of `steps` have as many tokens for each rank of a context group.
        context_rank: the place of this rank among the `context_size` ones of its context group, see `Layout`.
    """
    token_ids, positions, contexts, pages = [], [], [], []
    logit_rows = [np.zeros(0, dtype=np.int64)]
    first = 0
    for sequence in steps:
        count = len(sequence.token_ids)
        position = np.arange(sequence.position, sequence.position + count)
        token_ids.append(np.asarray(sequence.token_ids, dtype=np.int64))
        positions.append(position)
        contexts.append(np.maximum(position + 1, sequence.prompt_len))
        page, of = np.divmod((position - sequence.num_left_out) // page_size, context_size)
        pages.append(np.where(of == context_rank, sequence.pages[page], -1))
        logit_rows.append(np.arange(first + count - sequence.num_logits, first + count))
        first += count
    position = np.concatenate(positions)
    return Tokens(
        np.concatenate(token_ids), position, np.concatenate(contexts), np.concatenate(pages), position % page_size,
        np.concatenate(logit_rows),
    )  # fmt: skip
