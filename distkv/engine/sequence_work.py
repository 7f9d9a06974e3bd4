"""What a step does for one sequence."""

from dataclasses import dataclass, field

from distkv.engine.sequence import Sequence
from distkv.workers.group.step_plan import SequencePlan


@dataclass(eq=False, slots=True)
class SequenceWork:
    """Of a step, with what comes of it."""

    sequence: Sequence
    num_tokens: int  # that it runs, with those of a draft, or whose pages it fills with synthetic KV
    plan: SequencePlan | None = None  # None where nothing is run
    sampled_index: int | None = None  # of its first token among those that the step samples; None when it gets none
    pending_index: int | None = None  # of the token that it runs among those of the step before, while it is unknown
    # the last of its tokens, of which nobody knows yet whether they come
    draft: list[int] = field(default_factory=list)
    is_drafting: bool = False  # it is to find the draft's next token, and all that it runs is taken back
    num_right: int | None = None  # tokens of the draft that the answer goes on with, once its tokens are read
    is_damaged: bool = False  # could not read one of its pages, so its tokens are to be run again
