"""Which answers get drafts in the next step, and how long ones."""

import time

from distkv.engine.protocol import EngineInfo
from distkv.engine.sequence import Scheduled, Sequence
from distkv.engine.speculation.hit_rates import HitRates
from distkv.engine.speculation.ngram import NgramDrafter
from distkv.engine.speculation.step_cost import StepCost, draft_lengths
from distkv.engine.stats import SpeculationStats
from distkv.engine.step import Step


class Speculator:
    """Drafts tokens for answers that are being written. A step runs them behind the newest token; those that are what
    the answer's own draws give are its tokens, so that drafts change no answer."""

    def __init__(self, info: EngineInfo):
        assert info.speculation is not None
        self._info, self._config = info, info.speculation
        self._rates = HitRates()
        self._cost = StepCost()
        self._read_at = 0.0  # when tokens were read last
        self._num_drafts = self._num_drafted = self._num_accepted = 0

    @property
    def stats(self) -> SpeculationStats:
        """Sums since the start."""
        return SpeculationStats(self._num_drafts, self._num_drafted, self._num_accepted)

    def awaits(self, step: Step) -> bool:
        """Whether the step behind this one should wait for its tokens: it has drafts, or one of its sequences is likely
        to get one then."""
        return step.num_drafts > 0 or any(self._is_likely(one) for one in step.sequences if one.num_pending)

    def add_drafts(self, decoding: list[Sequence], most_tokens: int, most_pages: int) -> Scheduled:
        """Gives those of the sequences a draft for which it pays, and returns all of them with the tokens that each
        runs.

        Args:
            decoding: run their newest token each.
            most_tokens: that the step has room for beside these.
            most_pages: the same of KV pages.
        """
        room = min(most_tokens, self._info.max_num_seqs - len(decoding))
        chances = [self._chances(one) for one in decoding]
        scheduled: Scheduled = []
        for one, length in zip(decoding, self._lengths(chances, len(decoding), room), strict=True):
            length = self._fitting(one, length, most_pages)
            most_pages -= one.table.missing(1 + length) - one.table.missing(1)
            one.draft = self._drafter(one).draft(length) if length else []
            scheduled.append((one, 1 + length))
        return scheduled

    def take(self, step: Step) -> None:
        """Takes note of a step whose tokens have just been read."""
        now = time.perf_counter()
        if step.only_decodes:
            self._cost.note(step.num_drafted, now - max(step.started_at, self._read_at))
        self._read_at = now
        self._num_drafts += step.num_drafts
        self._num_drafted += step.num_drafted
        self._num_accepted += step.num_accepted

    def _is_likely(self, sequence: Sequence) -> bool:
        chances = self._chances(sequence)[:1]
        return bool(chances) and self._lengths([chances], 1, 1) == [1]

    def _lengths(self, chances: list[list[float]], num_sequences: int, most: int) -> list[int]:
        if self._config.adaptive:
            return draft_lengths(chances, num_sequences, self._cost.line(), most)
        lengths = []
        for own in chances:
            lengths.append(min(len(own), most))
            most -= lengths[-1]
        return lengths

    def _chances(self, sequence: Sequence) -> list[float]:
        """See `NgramDrafter.chances`: as many as its draft may have, with the token that it runs before."""
        own, most = sequence.request.params.num_speculative_tokens, self._config.num_speculative_tokens
        left = sequence.request.max_tokens - sequence.num_output_tokens - sequence.num_pending - 1
        most = min(most if own is None else min(own, most), left)
        return self._drafter(sequence).chances(most) if most > 0 and not sequence.finished else []

    def _fitting(self, sequence: Sequence, length: int, most_pages: int) -> int:
        """How much of a draft there is room for."""
        table, size = sequence.table, self._info.page_size
        if self._info.kv_cache_dtype != "auto":  # a page is rounded when it fills: not with tokens that may not stay
            length = min(length, size - 1 - (table.num_tokens + 1) % size)
        granted = min(most_pages, sequence.expected_pages - len(table.pages) - table.missing(1))
        num_pages = len(table.pages) + table.missing(1) + max(0, granted)
        return min(length, num_pages * size - table.num_tokens - 1)

    def _drafter(self, sequence: Sequence) -> NgramDrafter:
        if sequence.drafter is None:
            sequence.drafter = NgramDrafter(self._config, self._rates)
        sequence.drafter.read(sequence.token_ids)
        return sequence.drafter
