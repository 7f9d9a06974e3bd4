"""Which answers get drafts in the next step, and how long ones."""

import time

from distkv.engine.protocol import EngineInfo
from distkv.engine.sequence import Scheduled, Sequence
from distkv.engine.speculation.drafts import Drafts
from distkv.engine.speculation.step_cost import StepCost, draft_lengths, shared_out
from distkv.engine.stats import SpeculationStats
from distkv.engine.step import Step

PROBE_STEPS = 64  # without a draft, after which the shortest ones are tried: nothing is learned of those that are not


class Speculator:
    """Drafts tokens for answers that are being written. A step runs them behind the newest token; those that are what
    the answer's own draws give are its tokens, so that drafts change no answer."""

    def __init__(self, info: EngineInfo, drafts: Drafts):
        assert info.speculation is not None
        self._info, self._config = info, info.speculation
        self._drafts = drafts
        self._cost = StepCost()
        self._read_at = 0.0  # when tokens were read last
        self._num_without = 0  # steps since one had a draft
        self._num_drafts = self._num_drafted = self._num_accepted = 0

    @property
    def stats(self) -> SpeculationStats:
        """Sums since the start."""
        return SpeculationStats(self._num_drafts, self._num_drafted, self._num_accepted)

    def awaits(self, step: Step) -> bool:
        """Whether the step behind this one should wait for its tokens: it has drafts, or one of its sequences is likely
        to get one then."""
        return step.num_drafts > 0 or any(
            self._is_likely(one, len(step.work)) for one in step.sequences if one.num_pending
        )

    def add_drafts(self, decoding: list[Sequence], most_tokens: int, most_pages: int) -> Scheduled:
        """Gives those of the sequences a draft for which it pays, and returns all of them with the tokens that each
        runs.

        Args:
            decoding: run their newest token each.
            most_tokens: that the step has room for beside these.
            most_pages: the same of KV pages.
        """
        wanted = self._fitting_drafts(decoding, self._wanted(decoding, most_tokens), most_pages)
        if wanted:
            self._drafts.draft(wanted)
        return [(one, 1 + len(one.draft)) for one in decoding]

    def schedule_drafting(
        self, decoding: list[Sequence], most_tokens: int, most_pages: int, reads_prompts: bool
    ) -> Scheduled:
        """Those of the sequences, with the tokens that each runs, that should first have a step of their own, in which
        their drafts grow by a token; none where all drafts are as long as they should be.

        Args:
            reads_prompts: whether there are prompts to be read, which would wait; all else as above.
        """
        return []

    def take(self, step: Step) -> None:
        """Takes note of a step whose tokens have just been read."""
        now = time.perf_counter()
        if step.only_decodes:
            self._note_seconds(step, now - max(step.started_at, self._read_at))
        self._read_at = now
        self._num_without = 0 if step.num_drafts else self._num_without + 1
        for work in step.work:
            if work.num_right is not None:
                self._num_drafts += 1
                self._num_drafted += len(work.draft)
                self._num_accepted += work.num_right
                self._drafts.checked(work.sequence, len(work.draft), work.num_right)

    def _note_seconds(self, step: Step, seconds: float) -> None:
        self._cost.note(step.num_drafted, seconds)

    def _wanted(self, decoding: list[Sequence], most_tokens: int) -> list[int]:
        """How many tokens of a draft to check for each of the sequences, if these fit."""
        room = min(most_tokens, self._info.max_num_seqs - len(decoding))
        chances = [[] if one.num_pending else self._chances(one) for one in decoding]
        return self._lengths(chances, len(decoding), room)

    def _is_likely(self, sequence: Sequence, num_sequences: int) -> bool:
        chances = self._chances(sequence)[:1]
        return bool(chances) and self._lengths([chances], num_sequences, 1) == [1]

    def _lengths(self, chances: list[list[float]], num_sequences: int, most: int) -> list[int]:
        if self._config.adaptive:
            lengths = draft_lengths(chances, num_sequences, self._cost.line(), self._drafts.cost, most)
            if any(lengths) or self._drafts.is_free or self._num_without < PROBE_STEPS:
                return lengths
            chances = [own[:1] for own in chances]
        return shared_out(map(len, chances), most)

    def _chances(self, sequence: Sequence) -> list[float]:
        """See `Drafts.chances`: as many as its draft may have, with the token that it runs before."""
        own, most = sequence.request.params.num_speculative_tokens, self._config.num_speculative_tokens
        left = sequence.request.max_tokens - sequence.num_output_tokens - sequence.num_pending - 1
        most = min(most if own is None else min(own, most), left)
        return self._drafts.chances(sequence, most) if most > 0 and not sequence.finished else []

    def _fitting_drafts(
        self, decoding: list[Sequence], lengths: list[int], most_pages: int
    ) -> list[tuple[Sequence, int]]:
        """Those for whose drafts there is room, with how long they may be; the first of them get it first."""
        found = []
        for one, wanted in zip(decoding, lengths, strict=True):
            if length := self._fitting(one, wanted, most_pages):
                most_pages -= one.table.missing(1 + length) - one.table.missing(1)
                found.append((one, length))
        return found

    def _fitting(self, sequence: Sequence, length: int, most_pages: int) -> int:
        """How much of a draft there is room for."""
        table, size = sequence.table, self._info.page_size
        if self._info.kv_cache_dtype != "auto":  # a page is rounded when it fills: not with tokens that may not stay
            coded = self._info.coded_page_size
            length = min(length, coded - 1 - (table.num_tokens + 1) % coded)
        granted = min(most_pages, sequence.expected_pages - len(table.pages) - table.missing(1))
        num_pages = len(table.pages) + table.missing(1) + max(0, granted)
        return min(length, num_pages * size - table.num_tokens - 1)
