"""How each token of a step is to be sampled; without a tensor, for the leader writes it."""

from dataclasses import dataclass

import numpy as np

from distkv.workers.sampling.row_edits import RowEdits


@dataclass(slots=True)
class SampleRow:
    """How to sample one token; the parameters mean what they mean in `SamplingParams`."""

    logits_row: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    num_logprobs: int | None
    uniform: float  # decides which, in [0, 1), see `uniform_number`
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    # the output has one token more: the one of this index among those that the step before sampled
    pending: int | None = None
    edits: RowEdits | None = None  # None where there are none

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


def uniform_number(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of a request's seed, the index of its sample and the output position
    (Philox, https://doi.org/10.1145/2063384.2063405)."""
    key = np.array([seed & (2**64 - 1), sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=position)).random()
