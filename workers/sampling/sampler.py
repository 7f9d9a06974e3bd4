"""Samples the next tokens from logits, on rank 0. A token depends on its own row alone, never on its batch-mates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from torch import Tensor

from distkv.storage.device import device_of
from distkv.workers.runners.host_copies import Array, send
from distkv.workers.sampling.logit_edits import Edits, edit, edit_arrays
from distkv.workers.sampling.logprobs import pack_logprobs, unpack_logprobs
from distkv.workers.sampling.penalties import Penalties, penalise, penalty_arrays
from distkv.workers.sampling.sample_row import SampleRow
from distkv.workers.sampling.sampled_token import NO_TOKEN, SampledToken
from distkv.workers.sampling.softmax import softmax


class SampledTokens:
    """The tokens that a step has sampled, on their way to the host."""

    def __init__(self, tokens: Tensor, logprobs: Tensor | None, counts: list[int | None]):
        """
        Args:
            tokens: int64 `[rows]` on the device, NO_TOKEN where there is none.
            logprobs: what `pack_logprobs` made, of the rows whose `counts` are not None.
        """
        self.tokens = _in_vocabulary(tokens)  # a step that is under way before they are read may run them
        self._counts = counts
        numbers = tokens if logprobs is None else torch.cat([tokens, logprobs.view(-1)])
        self._copy = device_of(tokens.device).bring(numbers)

    def result(self) -> list[SampledToken]:
        """Waits for the tokens; may be called again. Raises what the device failed with."""
        numbers = self._copy.wait()
        tokens, packed = numbers[: len(self._counts)].tolist(), numbers[len(self._counts) :]
        wanted = [count for count in self._counts if count is not None]
        if not wanted:
            return [(token, None) for token in tokens]
        tables = iter(unpack_logprobs(packed.reshape(len(wanted), -1), wanted))
        return [
            (token, None if count is None else next(tables)) for token, count in zip(tokens, self._counts, strict=True)
        ]


SampleWay = Callable[[Tensor, Tensor | None], Tensor]
"""Samples from logits `[rows, vocab_size]`, given the `columns` of `Way`; int64 `[rows]`, NO_TOKEN where it cannot."""


@dataclass(frozen=True)
class Way(Generic[Array]):
    """Rows that are sampled in the same way."""

    sample: SampleWay
    is_adjusted: bool  # whether they have edits or penalties
    rows: Array | None  # int64, of the step; None where they are all rows, in their order, which needs no index
    places: Array | None  # int64, the same rows among their source's: the adjusted ones, or all
    columns: Array | None  # float64 [rows, 5], see `_columns`; None where the way needs none


@dataclass(frozen=True)
class Parameters(Generic[Array]):
    """What the device is told of the rows of a step."""

    logits_rows: Array | None  # int64 [rows]; None where they are those of the logits, in their order
    adjusted: Array | None  # int64, the rows with edits or penalties; None where they are none or all
    edits: Edits[Array] | None  # their rows are numbered among the adjusted ones, and so are those of the penalties
    penalties: Penalties[Array] | None
    ways: list[Way[Array]]
    with_logprobs: Array | None  # int64, the rows with log-probabilities; None where they are none or all


@torch.inference_mode()
def sample(logits: Tensor, rows: list[SampleRow], sampled: Tensor | None = None) -> SampledTokens:
    """Samples one token per row, on the device; nothing waits for it. Ties in greedy rows go to the lowest token id. A
    row whose logits, with its edits and penalties, are no numbers to choose by gets NO_TOKEN.

    Args:
        logits: fp32 `[N, vocab_size]`, left as they are; several rows may be sampled from the same ones.
        sampled: int64, what the step before sampled, for rows whose newest token is `pending`.
    """
    parameters: Parameters[Tensor] = send(_parameters(rows, *logits.shape), device_of(logits.device))
    logits = _pick(logits, parameters.logits_rows)
    adjusted = logits
    if parameters.edits is not None or parameters.penalties is not None:
        whole = parameters.adjusted is None
        adjusted = logits.clone(memory_format=torch.contiguous_format) if whole else _pick(logits, parameters.adjusted)
    if parameters.edits is not None:
        edit(adjusted, parameters.edits, sampled)
    if parameters.penalties is not None:
        penalise(adjusted, parameters.penalties, sampled)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for way in parameters.ways:
        own = way.sample(_pick(adjusted if way.is_adjusted else logits, way.places), way.columns)
        tokens = own if way.rows is None else tokens.index_copy_(0, way.rows, own)
    counts = [row.num_logprobs for row in rows]
    packed, most = None, max((count for count in counts if count is not None), default=None)
    if most is not None:
        with_logprobs = parameters.with_logprobs
        own = _in_vocabulary(_pick(tokens, with_logprobs))
        packed = pack_logprobs(_pick(logits, with_logprobs), own, most)
    return SampledTokens(tokens, packed, counts)


def _parameters(rows: list[SampleRow], num_logits: int, vocab_size: int) -> Parameters[np.ndarray]:
    logits_rows = [row.logits_row for row in rows]
    adjusted = [index for index, row in enumerate(rows) if row.edits is not None or row.penalised]
    place_of = {index: place for place, index in enumerate(adjusted)}
    edited = [(place_of[i], edits, rows[i].pending) for i in adjusted if (edits := rows[i].edits) is not None]
    penalised = [(place_of[i], rows[i]) for i in adjusted if rows[i].penalised]
    members: dict[tuple[SampleWay, bool], list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault((_way_of(row), index in place_of), []).append(index)
    return Parameters(
        logits_rows=None if logits_rows == list(range(num_logits)) else np.array(logits_rows),
        adjusted=_some(adjusted, rows),
        edits=edit_arrays(edited, vocab_size),
        penalties=penalty_arrays(penalised, vocab_size),
        ways=[
            Way(
                way,
                is_adjusted,
                rows=_some(mine, rows),
                places=_some([place_of[index] for index in mine], adjusted) if is_adjusted else _some(mine, rows),
                columns=None if way is _greedy else _columns([rows[index] for index in mine]),
            )
            for (way, is_adjusted), mine in members.items()
        ],
        with_logprobs=_some([index for index, row in enumerate(rows) if row.num_logprobs is not None], rows),
    )


def _some(indices: list[int], rows: Sequence[object]) -> np.ndarray | None:
    """Indices of some of the rows; None where they are none or all."""
    return np.array(indices) if 0 < len(indices) < len(rows) else None


def _pick(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values.index_select(0, rows)


def _columns(rows: list[SampleRow]) -> np.ndarray:
    """The parameters that the functions below take, float64 `[rows, 5]`."""
    return np.array(
        [(row.temperature, row.min_p, row.uniform, row.top_k if row.top_k > 0 else np.inf, row.top_p) for row in rows]
    )


def _way_of(row: SampleRow) -> SampleWay:
    # chosen by the row's own parameters: sorting for all would slow the rows that need no order
    if row.temperature == 0:
        return _greedy
    return _truncated if row.truncated else _plain


def _greedy(logits: Tensor, _: Tensor | None) -> Tensor:
    tokens = logits.argmax(-1)  # of a NaN, where there is one
    return _where_finite(logits.gather(1, tokens[:, None])[:, 0], tokens)


def _plain(logits: Tensor, columns: Tensor | None) -> Tensor:
    assert columns is not None
    probs = _probabilities(logits, columns)
    return _where_finite(probs[:, 0], _invert(probs, columns[:, 2:3]))


def _truncated(logits: Tensor, columns: Tensor | None) -> Tensor:
    assert columns is not None
    ordered, ids = _probabilities(logits, columns).sort(dim=-1, descending=True, stable=True)
    _truncate(ordered, columns)
    tokens = ids.gather(1, _invert(ordered, columns[:, 2:3])[:, None])[:, 0]
    return _where_finite(ordered[:, 0], tokens)


def _where_finite(numbers: Tensor, tokens: Tensor) -> Tensor:
    """The tokens of rows whose number is finite, NO_TOKEN for the others."""
    return torch.where(numbers.isfinite(), tokens, NO_TOKEN)


def _in_vocabulary(tokens: Tensor) -> Tensor:
    """The tokens, with some token for NO_TOKEN."""
    return tokens.clamp(min=0)


def _probabilities(logits: Tensor, columns: Tensor) -> Tensor:
    """float64 `[rows, vocab_size]` after temperature and min_p, not normalised again; NaN in the whole of a row with
    NaN or +inf, or with nothing but -inf."""
    temperature, min_p = columns[:, :1], columns[:, 1:2]
    logits = logits.double()
    # Subtract the maximum first, so that a tiny temperature cannot overflow.
    probs = softmax((logits - logits.amax(-1, keepdim=True)) / temperature)
    return probs.masked_fill_(probs < min_p * probs.amax(-1, keepdim=True), 0)


def _truncate(ordered: Tensor, columns: Tensor) -> None:
    """In place: keeps the top_k likeliest of a row sorted in descending order, and of those, by their mass
    renormalised, the fewest that reach top_p. The likeliest always stays."""
    top_k, top_p = columns[:, 3:4], columns[:, 4:]
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    ordered.masked_fill_(rank >= top_k, 0)
    mass = device_of(ordered.device).running_sums(ordered)
    # not by `sum`, which shares out a long row that comes alone
    ordered.masked_fill_((mass - ordered >= top_p * mass[:, -1:]) & (rank > 0), 0)


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative distribution: `[rows]`, never an entry of probability 0."""
    cumulative = device_of(probs.device).running_sums(probs)
    target = uniform * cumulative[:, -1:]
    # the last entry that is not 0, in case rounding puts the target at the very end
    last = probs.shape[1] - 1 - (probs > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.searchsorted(cumulative, target, right=True)[:, 0].minimum(last)
