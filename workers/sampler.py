"""Draws the next tokens from logits, on rank 0. A draw depends on its own row alone, never on its batch-mates."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class SampleRow:
    """How to draw one token; the parameters mean what they mean in `SamplingParams`."""

    logits_row: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    num_logprobs: int | None
    uniform: float  # the draw itself, in [0, 1)
    prompt_token_ids: list[int]
    output_token_ids: list[int]

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities under the model's own distribution, before penalties, temperature and truncation."""

    logprob: float  # of the drawn token
    rank: int  # of the drawn token, 1 is the likeliest
    top: list[tuple[int, float]]  # (token id, logprob), likeliest first


def uniform_draw(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of a request's seed, the index of its sample and the output position
    (Philox, https://doi.org/10.1145/2063384.2063405)."""
    key = np.array([seed & (2**64 - 1), sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=position)).random()


@torch.inference_mode()
def sample(logits: Tensor, rows: list[SampleRow]) -> list[tuple[int, TokenLogprobs | None]]:
    """Draws one token per row.

    Shapes: logits fp32 `[N, vocab_size]`; several rows may draw from the same logits. Ties in greedy rows go to the
    lowest token id.
    """
    picked = [row.logits_row for row in rows]
    adjusted = logits if picked == list(range(len(logits))) else logits[picked]
    if any(row.penalised for row in rows):
        adjusted = adjusted.clone()
        for index, row in enumerate(rows):
            if row.penalised:
                _penalise(adjusted[index], row)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    greedy = [i for i, row in enumerate(rows) if row.temperature == 0]
    plain = [i for i, row in enumerate(rows) if row.temperature > 0 and not row.truncated]
    truncated = [i for i, row in enumerate(rows) if row.temperature > 0 and row.truncated]
    if greedy:
        tokens[greedy] = adjusted[greedy].argmax(-1)
    # Two ways, chosen by the row's own parameters: sorting for all would slow the rows that need no order.
    if plain:
        probs, uniform = _probabilities(adjusted[plain], [rows[i] for i in plain])
        tokens[plain] = _invert(probs, uniform)
    if truncated:
        probs, uniform = _probabilities(adjusted[truncated], [rows[i] for i in truncated])
        ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
        _truncate(ordered, [rows[i] for i in truncated])
        tokens[truncated] = ids.gather(1, _invert(ordered, uniform)[:, None])[:, 0]
    drawn = tokens.tolist()
    return [
        (token, None if row.num_logprobs is None else _logprobs(logits[row.logits_row], token, row.num_logprobs))
        for token, row in zip(drawn, rows, strict=True)
    ]


def _penalise(logits: Tensor, row: SampleRow) -> None:
    """In place: repetition penalty on tokens of prompt and output (Keskar et al. 2019,
    https://arxiv.org/abs/1909.05858), presence and frequency penalties on those of the output."""
    if row.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt_token_ids, *row.output_token_ids}), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / row.repetition_penalty, values * row.repetition_penalty)
    counts = Counter(row.output_token_ids)
    if counts and (row.presence_penalty or row.frequency_penalty):
        seen = torch.tensor(list(counts), device=logits.device)
        count = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[seen] -= row.presence_penalty + row.frequency_penalty * count


def _probabilities(logits: Tensor, rows: list[SampleRow]) -> tuple[Tensor, Tensor]:
    """float64 `[rows, vocab_size]` after temperature and min_p, not normalised again, and the uniforms `[rows, 1]`."""
    parameters = [(row.temperature, row.min_p, row.uniform) for row in rows]
    columns = torch.tensor(parameters, dtype=torch.float64, device=logits.device)
    temperature, min_p, uniform = columns[:, :1], columns[:, 1:2], columns[:, 2:]
    logits = logits.double()
    # Subtract the maximum first, so that a tiny temperature cannot overflow.
    probs = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    return probs.masked_fill_(probs < min_p * probs.amax(-1, keepdim=True), 0), uniform


def _truncate(ordered: Tensor, rows: list[SampleRow]) -> None:
    """In place: keeps the top_k likeliest of a row sorted in descending order, and of those, by their mass
    renormalised, the fewest that reach top_p. The likeliest always stays."""
    vocab = ordered.shape[1]
    parameters = [(row.top_k if row.top_k > 0 else vocab, row.top_p) for row in rows]
    columns = torch.tensor(parameters, dtype=torch.float64, device=ordered.device)
    top_k, top_p = columns[:, :1], columns[:, 1:]
    place = torch.arange(vocab, device=ordered.device)
    ordered.masked_fill_(place >= top_k, 0)
    mass_before = ordered.cumsum(-1) - ordered
    ordered.masked_fill_((mass_before >= top_p * ordered.sum(-1, keepdim=True)) & (place > 0), 0)


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative distribution: `[rows]`, never an entry of probability 0."""
    cumulative = probs.cumsum(-1)
    target = uniform * cumulative[:, -1:]
    # the last entry that is not 0, in case rounding puts the target at the very end
    last = probs.shape[1] - 1 - (probs > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.searchsorted(cumulative, target, right=True)[:, 0].minimum(last)


def _logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    logprobs = torch.log_softmax(logits, dim=-1)
    rank = int((logprobs > logprobs[token]).sum()) + 1
    values, ids = logprobs.topk(min(count, len(logprobs)))
    top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(logprobs[token].item(), rank, top)
