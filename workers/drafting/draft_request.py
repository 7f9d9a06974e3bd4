"""What is asked of a draft model, without a tensor."""

from dataclasses import dataclass

from distkv.workers.sampling.sample_row import SampleRow


@dataclass(frozen=True)
class DraftRequest:
    """A draft for one answer."""

    number: int  # of its page table, by which it is known
    token_ids: list[int]  # of prompt and answer; with those that it had before at their beginning
    prompt_len: int
    rows: list[SampleRow]  # how each token of the draft is sampled; `logits_row` means nothing here
