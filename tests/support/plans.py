"""What a step asks of a rank, without an engine that plans it."""

from collections.abc import Sequence

import numpy as np

from distkv.workers.group.step_plan import SequencePlan, StepPlan
from distkv.workers.page_directory import SequenceStep


def sequence_step(
    token_ids: Sequence[int], start: int, pages: Sequence[int], prompt_len: int, num_logits: int
) -> SequenceStep:
    """The part of a sequence in a step, with its pages in place."""
    return SequenceStep(list(token_ids), start, np.asarray(pages, dtype=np.int64), prompt_len, num_logits)


def step_plan(
    steps: Sequence[SequenceStep], copies: Sequence[tuple[int, int]] = (), clear: Sequence[int] = ()
) -> StepPlan:
    """A plan that tells the ranks of every page anew."""
    sequences: list[SequencePlan] = []
    places: list[int] = []
    for table, one in enumerate(steps):
        ids = list(range(len(places), len(places) + len(one.pages)))
        places += one.pages.tolist()
        sequences.append(SequencePlan(table, one.token_ids, one.start, one.prompt_len, one.num_logits, 0, ids))
    return StepPlan(sequences, list(copies), list(clear), relocated=list(enumerate(places)))
