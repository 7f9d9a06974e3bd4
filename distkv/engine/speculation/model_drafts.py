"""Drafts by a small model, for all sequences."""

import logging
import time
from collections.abc import Callable

from distkv.engine.sample_rows import plain_row
from distkv.engine.sequence import Sequence
from distkv.engine.speculation.hit_rates import PlaceRates
from distkv.engine.speculation.step_cost import StepCost
from distkv.workers.drafting.draft_request import DraftRequest

log = logging.getLogger(__name__)

RunDrafts = Callable[[list[DraftRequest]], list[list[int]]]


class ModelDrafts:
    """`Drafts` of a draft model, which takes its time and runs while no step does."""

    is_free = False

    def __init__(self, run: RunDrafts):
        """`run` is `Executor.draft`."""
        self._run = run
        self._rates = PlaceRates()
        self._cost = StepCost()
        self._has_failed = False

    @property
    def cost(self) -> tuple[float, float]:
        return self._cost.line() if self._cost.is_known else (0.0, 0.0)

    def chances(self, sequence: Sequence, most: int) -> list[float]:
        return [] if self._has_failed else self._rates.chances(1, most)

    def draft(self, wanted: list[tuple[Sequence, int]]) -> None:
        """A context that the model has not read yet is read first, and there is no draft before that is done. A model
        that fails drafts no more; answers go on without it."""
        start = time.perf_counter()
        try:
            drafts = self._run([_request(sequence, length) for sequence, length in wanted])
        except Exception as error:
            log.warning(
                "the draft model failed and drafts no more, so that each step brings a token (%s: %s); where it was "
                "memory, lower draft_kv_bytes or max_num_batched_tokens",
                type(error).__name__, error,
            )  # fmt: skip
            self._has_failed = True
            return
        seconds = time.perf_counter() - start
        begins = False
        for (sequence, _), draft in zip(wanted, drafts, strict=True):
            begins |= not draft or not sequence.is_drafted_for
            sequence.draft, sequence.is_drafted_for = draft, bool(draft)
        if not begins:
            self._cost.note(sum(map(len, drafts)), seconds)

    def checked(self, sequence: Sequence, num_drafted: int, num_right: int) -> None:
        self._rates.note_draft(num_drafted, num_right)


def _request(sequence: Sequence, length: int) -> DraftRequest:
    """The draws are those of the answer's own tokens, so that both models choose alike; what the request does to logits
    besides is left out."""
    first = sequence.num_output_tokens
    rows = [plain_row(sequence, sequence.index, 0, position) for position in range(first, first + length)]
    return DraftRequest(sequence.number, sequence.token_ids, sequence.prompt_len, rows)
