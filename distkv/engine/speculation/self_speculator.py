"""Drafts by the model itself: steps that draft go before a step that checks."""

from distkv.engine.protocol import EngineInfo
from distkv.engine.sequence import Scheduled, Sequence
from distkv.engine.speculation.self_drafts import SelfDrafts
from distkv.engine.speculation.speculator import Speculator
from distkv.engine.speculation.step_cost import StepCost, drafted_lengths, shared_out
from distkv.engine.stats import SpeculationStats
from distkv.engine.step import Step
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.tier import DEVICE

TRIAL_TOKENS = 2  # of a draft that is to show whether drafts pay
TRIAL_SHARE = 0.02  # of all time that such drafts may take


class SelfSpeculator(Speculator):
    """Before an answer's context is swept, steps that attend to its resident pages alone draft a token each. Each runs
    the newest token and the draft so far, and all of that is taken back, so that nothing of a draft but its tokens is
    kept from one step to the next: those that are checked write their keys and values anew.

    An answer whose pages are all resident has no draft. Neither has any while a prompt is read, which would wait;
    unless drafts are not to be adaptive.
    """

    def __init__(self, info: EngineInfo, drafts: SelfDrafts, cache: TieredCache):
        super().__init__(info, drafts)
        self._of, self._cache = drafts.of, cache
        self._drafting_cost = StepCost()  # of steps that draft
        self._num_drafting_steps = 0
        self._drafting_seconds = 0.0  # since a draft was checked
        self._trial_seconds = 0.0  # the same before that, since the draft before
        self._plain_seconds = 0.0  # of steps without a draft, since one was checked

    @property
    def stats(self) -> SpeculationStats:
        """See `Speculator`."""
        return SpeculationStats(self._num_drafts, self._num_drafted, self._num_accepted, self._num_drafting_steps)

    def awaits(self, step: Step) -> bool:
        """See `Speculator`."""
        if step.is_drafting or step.num_drafts:
            return True
        if self._config.adaptive and not step.only_decodes:
            return False
        return any(self._targets([one for one in step.sequences if one.num_pending]))

    def schedule_drafting(
        self, decoding: list[Sequence], most_tokens: int, most_pages: int, reads_prompts: bool
    ) -> Scheduled:
        """See `Speculator`."""
        if any(one.num_pending for one in decoding) or (reads_prompts and self._config.adaptive):
            return []
        scheduled: Scheduled = []
        for one, target in self._fitting_drafts(decoding, self._targets(decoding, most_tokens), most_pages):
            drafter = self._of(one)
            if drafter.num_tokens < target and not drafter.has_ended:
                one.draft, one.is_drafting = drafter.draft(target), True
                scheduled.append((one, 1 + len(one.draft)))
        return scheduled

    def take(self, step: Step) -> None:
        """See `Speculator`."""
        super().take(step)
        self._num_drafting_steps += step.is_drafting
        for sequence, token_id in step.drafted:
            self._of(sequence).add(token_id)

    def _note_seconds(self, step: Step, seconds: float) -> None:
        if step.is_drafting:
            self._drafting_seconds += self._drafting_cost.note(step.num_drafted, seconds)
            return
        self._cost.note(step.num_drafted, seconds)
        if step.num_drafts:
            self._trial_seconds, self._drafting_seconds, self._plain_seconds = self._drafting_seconds, 0.0, 0.0
        else:
            self._plain_seconds += seconds

    def _wanted(self, decoding: list[Sequence], most_tokens: int) -> list[int]:
        """What has been drafted."""
        room = min(most_tokens, self._info.max_num_seqs - len(decoding))
        return shared_out((0 if one.num_pending else self._of(one).num_tokens for one in decoding), room)

    def _targets(self, decoding: list[Sequence], most_tokens: int | None = None) -> list[int]:
        """How long the draft of each sequence should become."""
        room = self._info.max_num_seqs - len(decoding)
        room = room if most_tokens is None else min(room, most_tokens)
        if not self._config.adaptive:
            return self._lengths([self._chances(one) for one in decoding], len(decoding), room)
        if not self._cache.has_cold or not self._cost.is_known:
            return [0] * len(decoding)
        is_trial = self._plain_seconds * TRIAL_SHARE > self._trial_seconds
        if not is_trial and not self._drafting_cost.is_known:
            return [0] * len(decoding)
        chances = [self._chances(one) if _has_cold(one) else [] for one in decoding]
        lengths = [0] * len(decoding)
        if self._drafting_cost.is_known:
            costs = self._cost.line(), self._drafting_cost.line()
            lengths = drafted_lengths(chances, len(decoding), *costs, room)
        if is_trial and not any(lengths):
            lengths = shared_out((min(len(own), TRIAL_TOKENS) for own in chances), room)
        return lengths

    def _fitting(self, sequence: Sequence, length: int, most_pages: int) -> int:
        table = sequence.table
        if self._info.kv_cache_dtype != "auto" and (table.num_tokens + 1) % self._info.coded_page_size == 0:
            return 0  # the newest token alone would fill its page, which is rounded then, and it will be run again
        return super()._fitting(sequence, length, most_pages)


def _has_cold(sequence: Sequence) -> bool:
    """Whether it has a page below the device, which is mostly one of its first."""
    return not all(page.has(DEVICE) for page in sequence.table.pages)
