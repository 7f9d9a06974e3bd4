"""Samples the next tokens from logits, on rank 0. A token depends on its own row alone, never on its batch-mates."""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from distkv.workers.runners.host_copies import HostCopy, to_device
from distkv.workers.sampling.logprobs import pack_logprobs, unpack_logprobs
from distkv.workers.sampling.penalties import penalise, penalty_arrays
from distkv.workers.sampling.sample_row import SampleRow
from distkv.workers.sampling.sampled_token import SampledToken


class SampledTokens:
    """The tokens that a step has sampled, on their way to the host."""

    def __init__(self, tokens: Tensor, logprobs: Tensor | None, counts: list[int | None]):
        """
        Args:
            logprobs: what `pack_logprobs` made, of the rows whose `counts` are not None.
        """
        self.tokens = tokens  # int64 [rows], on the device
        self._counts = counts
        self._copy = HostCopy(tokens if logprobs is None else torch.cat([tokens, logprobs.view(-1)]))

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


@torch.inference_mode()
def sample(logits: Tensor, rows: list[SampleRow], sampled: Tensor | None = None) -> SampledTokens:
    """Samples one token per row, on the device; nothing waits for it. Ties in greedy rows go to the lowest token id.

    Args:
        logits: fp32 `[N, vocab_size]`, left as they are; several rows may be sampled from the same ones.
        sampled: int64, what the step before sampled, for rows whose newest token is `pending`.
    """
    picked = [row.logits_row for row in rows]
    ways: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        ways["greedy" if row.temperature == 0 else "truncated" if row.truncated else "plain"].append(index)
    tables = [index for index, row in enumerate(rows) if row.num_logprobs is not None]
    arrays = penalty_arrays([(index, row) for index, row in enumerate(rows) if row.penalised], logits.shape[1])
    is_penalised = bool(arrays)
    # what stands for all rows in their order needs no index
    if picked != list(range(len(logits))):
        arrays["picked"] = np.array(picked)
    for way, members in (ways | {"tables": tables}).items():
        if 0 < len(members) < len(rows):
            arrays[way] = np.array(members)
    for way in ways.keys() - {"greedy"}:
        arrays[f"parameters of {way}"] = np.array([_parameters(rows[index]) for index in ways[way]])
    sent = to_device(arrays, logits.device)

    def of(name: str, values: Tensor) -> Tensor:
        return values.index_select(0, sent[name]) if name in sent else values

    logits = of("picked", logits)
    adjusted = logits
    if is_penalised:
        adjusted = logits.clone(memory_format=torch.contiguous_format)
        penalise(adjusted, sent, sampled)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for way in ways:
        own = _DRAW[way](of(way, adjusted), sent.get(f"parameters of {way}"))
        tokens = tokens.index_copy_(0, sent[way], own) if way in sent else own
    packed = None
    if tables:
        most = max(rows[index].num_logprobs or 0 for index in tables)
        packed = pack_logprobs(of("tables", logits), of("tables", tokens), most)
    return SampledTokens(tokens, packed, [row.num_logprobs for row in rows])


def _parameters(row: SampleRow) -> tuple[float, ...]:
    """The columns of float64 that the functions below take."""
    return row.temperature, row.min_p, row.uniform, row.top_k if row.top_k > 0 else np.inf, row.top_p


def _greedy(logits: Tensor, _: Tensor | None) -> Tensor:
    return logits.argmax(-1)


# Two ways, chosen by the row's own parameters: sorting for all would slow the rows that need no order.
def _plain(logits: Tensor, columns: Tensor | None) -> Tensor:
    assert columns is not None
    return _invert(_probabilities(logits, columns), columns[:, 2:3])


def _truncated(logits: Tensor, columns: Tensor | None) -> Tensor:
    assert columns is not None
    ordered, ids = _probabilities(logits, columns).sort(dim=-1, descending=True, stable=True)
    _truncate(ordered, columns)
    return ids.gather(1, _invert(ordered, columns[:, 2:3])[:, None])[:, 0]


_DRAW = {"greedy": _greedy, "plain": _plain, "truncated": _truncated}


def _probabilities(logits: Tensor, columns: Tensor) -> Tensor:
    """float64 `[rows, vocab_size]` after temperature and min_p, not normalised again."""
    temperature, min_p = columns[:, :1], columns[:, 1:2]
    logits = logits.double()
    # Subtract the maximum first, so that a tiny temperature cannot overflow.
    probs = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    return probs.masked_fill_(probs < min_p * probs.amax(-1, keepdim=True), 0)


def _truncate(ordered: Tensor, columns: Tensor) -> None:
    """In place: keeps the top_k likeliest of a row sorted in descending order, and of those, by their mass
    renormalised, the fewest that reach top_p. The likeliest always stays."""
    top_k, top_p = columns[:, 3:4], columns[:, 4:]
    place = torch.arange(ordered.shape[1], device=ordered.device)
    ordered.masked_fill_(place >= top_k, 0)
    mass_before = _cumulated(ordered) - ordered
    ordered.masked_fill_((mass_before >= top_p * ordered.sum(-1, keepdim=True)) & (place > 0), 0)


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative distribution: `[rows]`, never an entry of probability 0."""
    cumulative = _cumulated(probs)
    target = uniform * cumulative[:, -1:]
    # the last entry that is not 0, in case rounding puts the target at the very end
    last = probs.shape[1] - 1 - (probs > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.searchsorted(cumulative, target, right=True)[:, 0].minimum(last)


def _cumulated(probs: Tensor) -> Tensor:
    """Sums along each row, which never fall. On CUDA rounding might make them, and a single row would take another
    algorithm than several, which may round otherwise."""
    if not probs.is_cuda:
        return probs.cumsum(-1)
    rows = probs if len(probs) > 1 else probs.expand(2, -1)
    return rows.cumsum(-1).cummax(-1).values[: len(probs)]
