"""How a step is cut into micro-batches, so that the stages of a pipeline work at the same time.

A step of M micro-batches on S stages takes M + S - 1 turns, each as long as a micro-batch takes a stage: what it takes
however small it is (`fixed`: the stage's weights are read), and its share of all else (`variable`). So the step takes
`(M + S - 1) * (fixed + variable / M)`, which is least where `M * M = (S - 1) * variable / fixed`. A step of a few short
answers is not cut at all: the weights would be read twice for nothing. Long chunks and long contexts are.

All ranks cut alike, since they do so by the plan alone.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from distkv.storage.paging import pages_for
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import MAX_DECODE_TOKENS

ROWS_PER_READ = 32.0
"""Rows of a product that take about as long as reading its weights."""
COLD = 4.0
"""How much longer it takes to read a page that lies below the device."""


@dataclass(frozen=True)
class StepCosts:
    """What parts of a step take a stage, in units of reading its weights; roughly, from the model's sizes."""

    read: float  # to read the keys and values of a token
    row: float  # to multiply a token with the weights
    attend: float  # to multiply a token with the keys and values of one

    @classmethod
    def of(cls, model: ModelConfig) -> "StepCosts":
        """Of a model; the parts of a stage, or of a rank, are to each other as those of all."""
        heads, kv_heads, dim = model.num_attention_heads, model.num_key_value_heads, model.head_dim
        weights = model.hidden_size * (2 * (heads + kv_heads) * dim + 3 * model.intermediate_size)
        return cls(2 * kv_heads * dim / weights, 1 / ROWS_PER_READ, 2 * heads * dim / weights / ROWS_PER_READ)

    def rows(self, step: SequenceStep) -> float:
        """To multiply each new token, with the weights and with the tokens before it."""
        return self.row + self.attend * (step.start + len(step.token_ids) / 2)


def cut_step(steps: list[SequenceStep], costs: StepCosts, num_stages: int, page_size: int) -> list[list[SequenceStep]]:
    """The micro-batches of a step, in order: their rows, one micro-batch after the other, are those of the step.

    A chunk of a prompt may be cut where a page begins. What lies below the device is brought for each micro-batch that
    reads it, so with a chunk that does, or where several sequences read the same, it counts as fixed.
    """
    bounds: list[tuple[int, int]] = []  # by piece that is not cut: its sequence, and its last row there
    found: list[np.ndarray] = []  # their costs
    read = costs.read * page_size
    shared = _shared_cold(steps)
    fixed = 1.0 + COLD * read * len(shared)
    for number, step in enumerate(steps):
        count = len(step.token_ids)
        pages = step.pages[: pages_for(step.start, page_size)]
        cold = pages[pages < 0]
        resident = read * (len(pages) - len(cold))
        own_cold = COLD * read * (len(cold) - int(np.isin(cold, shared).sum()) if len(shared) else len(cold))
        ends = np.array([count])
        if count > MAX_DECODE_TOKENS:
            fixed, own_cold = fixed + own_cold, 0.0
            ends = np.append(np.arange(page_size - step.start % page_size, count, page_size), count)
        bounds += [(number, end) for end in ends.tolist()]
        found.append(np.diff(ends, prepend=0) * (costs.rows(step) + (resident + own_cold) / count))
    cost = np.concatenate(found)
    total = float(cost.sum())
    num_batches = min(len(cost), max(1, round(math.sqrt((num_stages - 1) * total / fixed))))
    batch_of = ((np.cumsum(cost) - cost / 2) / total * num_batches).astype(int)
    batches: dict[int, list[SequenceStep]] = {}
    begun = [0] * len(steps)  # rows of each that are in batches already
    for place, (number, end) in enumerate(bounds):
        is_last = place + 1 == len(bounds) or bounds[place + 1][0] != number or batch_of[place + 1] != batch_of[place]
        if is_last:
            batches.setdefault(int(batch_of[place]), []).append(_part(steps[number], begun[number], end, page_size))
            begun[number] = end
    return list(batches.values())


def _shared_cold(steps: list[SequenceStep]) -> np.ndarray:
    """Where pages below the device lie that several sequences read."""
    cold = [step.pages[step.pages < 0] for step in steps]
    if sum(len(one) > 0 for one in cold) < 2:
        return np.zeros(0, dtype=np.int64)
    places, counts = np.unique(np.concatenate(cold), return_counts=True)
    return places[counts > 1]


def _part(step: SequenceStep, first: int, end: int, page_size: int) -> SequenceStep:
    """The new tokens of a sequence from the first-th on up to another, behind those before them. What is cut is part of
    a prompt, of which the host has no share."""
    count = len(step.token_ids)
    if end - first == count:
        return step
    num_pages = pages_for(step.start + end, page_size)
    return replace(
        step,
        token_ids=step.token_ids[first:end],
        start=step.start + first,
        pages=step.pages[:num_pages],
        page_ids=step.page_ids[:num_pages],
        num_logits=max(0, end - max(first, count - step.num_logits)),
        host_slots=step.host_slots[:0],
    )
