"""Turns the sequences of a step into the tensors that all layers share.

Dims: T tokens of the step, H query heads, K KV heads, S page_size, D head_dim.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from distkv.storage.moving.staging_ring import Load, Stream
from distkv.workers.page_directory import SequenceStep

# Sequences with at most this many new tokens take the decode path, which reads each page once for all of them.
MAX_DECODE_TOKENS = 8


FIELDS = ("token_ids", "positions", "context", "page", "offset", "logit_rows")


class Attention(Protocol):
    """How a step attends to its pages, on one kind of device."""

    @property
    def loads(self) -> list[Load]:
        """What `attend` takes from the stream in each layer."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_pool: Tensor, stream: Stream | None) -> Tensor:
        """Attention of all new tokens of one layer, whose keys and values are already in their pages.

        Shapes: q `[T, H, D]`; k, v `[T, K, D]`; layer_pool `[2, pages, K, S, D]`; `stream` gives `loads`, None when
        there are none. Returns `[T, H * D]`.
        """


@dataclass(frozen=True)
class Batch:
    """A step, ready to run."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    context: Tensor  # int64 [T], see RotaryEmbedding.angles
    page: Tensor  # int64 [T], device slot of each token, -1 for padding
    offset: Tensor  # int64 [T], place in that page
    logit_rows: Tensor  # int64, rows of the step whose logits are wanted
    attention: Attention

    @classmethod
    def of(cls, arrays: dict[str, Tensor], attention: Attention) -> "Batch":
        """Of the arrays of `token_arrays`, on the device."""
        return cls(**{field: arrays[field] for field in FIELDS}, attention=attention)


def token_arrays(steps: list[SequenceStep], page_size: int) -> dict[str, np.ndarray]:
    """The fields of `Batch` but the last, as int64 arrays."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("token_ids", "positions", "context", "page")}
    logit_rows = [np.zeros(0, dtype=np.int64)]
    first = 0
    for sequence in steps:
        count = len(sequence.token_ids)
        position = np.arange(sequence.start, sequence.start + count)
        columns["token_ids"].append(np.asarray(sequence.token_ids, dtype=np.int64))
        columns["positions"].append(position)
        columns["context"].append(np.maximum(position + 1, sequence.prompt_len))
        columns["page"].append(sequence.pages[position // page_size])
        logit_rows.append(np.arange(first + count - sequence.num_logits, first + count))
        first += count
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    return arrays | {"offset": arrays["positions"] % page_size, "logit_rows": np.concatenate(logit_rows)}
