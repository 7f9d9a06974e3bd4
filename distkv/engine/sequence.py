"""One answer that is being written: its tokens and its pages."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distkv.engine.answer_lengths import AnswerLengths
from distkv.engine.protocol import EngineRequest
from distkv.engine.synthetic_kv import SyntheticKV
from distkv.engine.token_rules import TokenRules
from distkv.storage.ledger.page import Page, PageKey
from distkv.storage.ledger.page_table import PageTable
from distkv.storage.ledger.prefix_index import page_key
from distkv.storage.paging import pages_for
from distkv.storage.tier import Tier
from distkv.workers.group.step_plan import SequencePlan, placeholder

if TYPE_CHECKING:
    from distkv.engine.speculation.ngram import NgramDrafter
    from distkv.engine.speculation.self_drafter import SelfDrafter


@dataclass(eq=False)
class Sequence:
    """Answer `index` of a request. The keys and values of its first `table.num_tokens` tokens are in the pages, or will
    be when the steps under way have ended."""

    request: EngineRequest
    index: int
    number: int  # of its page table on the ranks; rises with arrival
    table: PageTable
    token_ids: list[int]  # prompt and answer
    root: bytes | None  # of the chain of page keys; None when its pages are its own
    keys: list[PageKey] = field(default_factory=list)  # of its first full pages
    keeps_answer: bool = True  # whether pages with tokens of the answer have keys: not where those do not attend to all
    lengths: AnswerLengths = field(default_factory=AnswerLengths)  # of answers before it
    num_observed: int = 0  # of the last tokens of the prompt, see `EngineInfo`
    num_pending: int = 0  # tokens that steps under way sample, which are not known yet
    num_sent: int = 0  # pages that the ranks' table holds
    draft: list[int] = field(default_factory=list)  # tokens that its next step runs behind its newest one
    is_drafting: bool = False  # whether that is to find the draft's next token, not to check the draft
    drafter: "NgramDrafter | SelfDrafter | None" = None  # once tokens were looked up for it, or drafted by itself
    is_drafted_for: bool = False  # by a draft model, which has read all of it
    rules: TokenRules | None = None  # None where its parameters let every token be
    num_scored: int = 0  # tokens behind the first one whose log-probabilities are known, if wanted
    cached_tiers: list[Tier | None] = field(default_factory=list)  # where its first pages were found; None: lost since
    expected: list[Page] = field(default_factory=list)  # what was found when it was queued
    found: list[Page] = field(default_factory=list)  # what is known of its prefix, as of `found_at`
    found_at: int = -1  # `TieredCache.num_findable_changes`
    awaits: "Sequence | None" = None  # computes a page that this one shares; it is not admitted before that is done
    lacks_room: bool = False  # waits for pages of others, see `PagePromises`
    lacks_share: bool = False  # does so for those of its tenant alone
    is_guessed: bool = False  # may turn out to need more pages than are expected, and is preempted then, but once
    was_preempted: bool = False
    fell_from: int = 0  # tokens that it had run when it had to read some of them again
    losses: Counter[int] = field(default_factory=Counter)  # of pages by their indexes, see `Repairs.lose`
    is_parked: bool = False  # waits, so that others need not stream beside it
    arrival: int = -1  # of its request: the number of its first answer
    turn: int = 0  # those of a lower turn go first, see `ColdBudget`
    turn_steps: int = 0
    dropped: set[int] = field(default_factory=set)  # answers that it stands for and nobody wants any more
    finished: bool = False
    has_begun: bool = False  # the first tokens of the request's answers have come, so it is one of them
    # by `time.perf_counter`, 0.0 until then
    arrived_at: float = 0.0
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    def __post_init__(self) -> None:
        self.prompt_len = len(self.request.prompt_token_ids)
        self.arrival = self.number if self.arrival < 0 else self.arrival
        # tokens that are scored, with the first one, and how many likeliest ones go with each; None where none is
        scores_begun = self.request.begun_logprobs is not None
        self.num_to_score = len(self.token_ids) if scores_begun else self.prompt_len
        self.num_top = self.request.begun_logprobs if scores_begun else self.request.params.prompt_logprobs
        # tokens that are read in chunks; with those of the answer where it was preempted, or begun elsewhere
        self.num_to_read = self.prompt_len
        seed = self.request.synthetic_kv_seed
        tokens = self.num_prefix_pages * self.table.page_size
        self.synthetic = SyntheticKV() if seed is None else SyntheticKV(seed, tokens)
        self.num_to_read = len(self.token_ids)

    @property
    def place(self) -> tuple[int, int, int]:
        """In line: by priority, then by arrival of the request."""
        return self.request.priority, self.arrival, self.number

    @property
    def num_prefix_pages(self) -> int:
        """Full pages of what is to be read that may be taken over: without its last token, which must be run for its
        logits, without the tokens whose logits score others, and without those that a policy of attention observes."""
        is_scored = self.num_top is None or self.num_scored == self.num_to_score - 1
        most = self.num_to_read - 1 if is_scored else self.num_scored
        return self._num_keys(min(most, self.first_observed) if self.num_observed else most)

    @property
    def first_observed(self) -> int:
        """The position of the first token that a policy of attention observes: it remembers what came of this and all
        later ones, as long as they are run in order."""
        return max(0, self.prompt_len - self.num_observed)

    def is_observed(self, page_index: int) -> bool:
        """Whether a page has tokens that a policy of attention observes."""
        return bool(self.num_observed) and page_index >= self.first_observed // self.table.page_size

    @property
    def is_reading_again(self) -> bool:
        """Whether it has still to run tokens that it had run before."""
        return self.table.num_committed < self.fell_from

    @property
    def num_cached(self) -> tuple[int, int, int]:
        """Tokens of the prompt whose keys and values were found and read, by tier."""
        device, host, disk = (self.cached_tiers.count(tier) * self.table.page_size for tier in Tier)
        return device, host, disk

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def is_prefilling(self) -> bool:
        """Whether steps that read the prompt, or all that it had when it was preempted, are still to come."""
        return self.table.num_tokens < self.num_to_read

    @property
    def num_answers(self) -> int:
        """Answers that this sequence stands for: all of its request's until they are forked off it."""
        return 1 if self.num_output_tokens or self.request.begun else self.request.params.n

    @property
    def is_alone(self) -> bool:
        """Whether it stands for its own answer alone, not for all answers of a request whose prompt is being read."""
        return self.num_answers == 1

    @property
    def may_decode(self) -> bool:
        """Whether a step may run the answer's newest token, known already or sampled by a step under way."""
        known = self.num_output_tokens
        return 0 < known + self.num_pending < self.request.max_tokens and (known > 0 or self.is_alone)

    @property
    def expected_pages(self) -> int:
        """Pages that all answers which this sequence stands for will need: at most, or else as far as one can tell."""
        return self.likely_pages if self.is_guessed else self._most_pages

    @property
    def likely_pages(self) -> int:
        """Pages that all answers which this sequence stands for will need if they become as long as those before them,
        and never more than they may need at most."""
        likely = self._pages_at(self.prompt_len + self.lengths.expected(self.num_output_tokens))
        return min(self._most_pages, likely)

    @property
    def first_pages(self) -> int:
        """Pages that it will need to read its prompt and to go on by a token."""
        return min(self._most_pages, self._pages_at(self.num_to_read + 1))

    @property
    def _most_pages(self) -> int:
        return most_pages(self.request, self.table.page_size, self.num_answers, self.num_observed)

    @property
    def num_synthetic_left(self) -> int:
        """Tokens of the prompt whose pages have still to be filled, not read."""
        return self.synthetic.num_left(self.table.num_tokens)

    def num_fork_pages(self, count: int) -> int:
        """Pages that the other answers of the request need once `count` more tokens have been read: a copy each of the
        last page of the prompt, unless that is full, or they read it themselves."""
        if self.num_observed:
            return 0
        ends = self.table.num_tokens + count == self.prompt_len
        return self.num_answers - 1 if ends and self.prompt_len % self.table.page_size else 0

    def by_importance(self) -> Iterator[Page]:
        """Its pages in the order in which they are best kept near: the first, then the newest."""
        yield from self.table.pages[:1]
        yield from reversed(self.table.pages[1:])

    def will_compute(self, index: int, key: PageKey) -> bool:
        """Whether steps that are still to end will fill the page of that index and key."""
        is_ahead = self.table.num_committed // self.table.page_size <= index < len(self.keys)
        return is_ahead and not self.finished and self.keys[index].digest == key.digest

    def page_keys(self, num_tokens: int) -> list[PageKey] | None:
        """The keys of the full pages of its first tokens, at least, as far as those have any; None when all its pages
        are its own."""
        if self.root is None:
            return None
        assert num_tokens <= len(self.token_ids), "a key takes the tokens themselves"
        size = self.table.page_size
        for index in range(len(self.keys), self._num_keys(num_tokens)):
            parent = self.keys[-1].digest if self.keys else self.root
            self.keys.append(page_key(parent, self.token_ids[index * size : (index + 1) * size]))
        return self.keys

    def plan(
        self, start: int, count: int, num_logits: int, pending_index: int | None = None, draft: Iterable[int] = ()
    ) -> SequencePlan:
        """Its part of a step; sends the ranks the pages that they do not know yet, too.

        Args:
            pending_index: where it runs a token that nobody knows yet, the token's index among those that the step
                before sampled.
            draft: tokens that it runs behind those of the answer.
        """
        end, sent = start + count, self.num_sent
        known = [*self.token_ids[start:end], *draft]
        token_ids = known if pending_index is None else [placeholder(pending_index)]
        assert len(token_ids) == count
        pages: list[int] = []
        if end > sent * self.table.page_size:
            self.num_sent = pages_for(end, self.table.page_size)
            pages = [page.id for page in self.table.pages[sent : self.num_sent]]
        return SequencePlan(self.number, token_ids, start, self.prompt_len, num_logits, sent, pages)

    def add_scored(self, plan: SequencePlan) -> None:
        """Has its part of a step score the tokens behind those that it runs, as far as they are to be and are not."""
        first, end = max(plan.start, self.num_scored), plan.start + len(plan.token_ids)
        plan.scored = self.token_ids[first + 1 : min(end + 1, self.num_to_score)]
        plan.num_top = self.num_top or 0

    def ending(self, eos_token_ids: tuple[int, ...]) -> tuple[str | None, int | None]:
        """Why the answer ends with its newest token, if it does, and the token that was asked to stop it."""
        token = self.token_ids[-1]
        if not self.request.params.ignore_eos and token in eos_token_ids:
            return "stop", None
        if token in self.request.stop_token_ids:
            return "stop", token
        return ("length" if self.num_output_tokens >= self.request.max_tokens else None), None

    def rewind(self, count: int, has_run: bool) -> None:
        """Takes back what a step with `count` of its tokens was to do. If ranks may have run it, they may have rounded
        a page that it fills, or a rank's part of one, with all tokens in it, and a policy of attention may remember it:
        tokens before the step are read again, too."""
        table, end = self.table, self.table.num_tokens
        part = end // table.part_size  # the first one that the step leaves open
        table.rewind(count)
        if has_run and self.num_observed and end > self.first_observed:
            self.read_again()
            self.fell_from = end
        elif has_run and table.num_tokens // table.part_size < part:
            table.cut(table.num_tokens // table.page_size)
            self.num_to_read = len(self.token_ids)
        self.num_sent = min(self.num_sent, len(self.table.pages))

    def reject(self, count: int) -> None:
        """Takes back the last tokens that a step has run, which nobody keeps. They have filled no page of which others
        are kept, where that would round it. No other step may be under way."""
        self.table.rewind(count)
        self.num_sent = min(self.num_sent, len(self.table.pages))

    def read_again(self) -> None:
        """Takes back the tokens that a policy of attention observes, and those before them in their page, so that it
        remembers them anew. No step may be under way."""
        table = self.table
        self.fell_from = table.num_committed
        table.cut(min(table.num_tokens, self.first_observed) // table.page_size)
        self.num_to_read, self.num_sent = len(self.token_ids), min(self.num_sent, len(table.pages))

    def commit(self, count: int) -> None:
        """Takes note that a step with `count` of its tokens has ended well."""
        table = self.table
        if table.num_committed % table.page_size + count < table.page_size:
            table.num_committed += count
        else:
            table.commit(count, self.page_keys(table.num_committed + count))

    def fork(self, index: int, number: int) -> tuple["Sequence", tuple[Page, Page] | None]:
        """Another answer from the same state; also the page copy it needs, see `PageTable.fork`. Where a policy of
        attention observes the end of the prompt, the fork reads that itself, so that the policy remembers it."""
        copy: tuple[Page, Page] | None = None
        if self.num_observed:
            table = self.table.fork_first(self.first_observed // self.table.page_size)
        else:
            table, copy = self.table.fork()
        fork = Sequence(
            self.request, index, number, table, list(self.token_ids), self.root, list(self.keys), self.keeps_answer,
            self.lengths, self.num_observed,
        )  # fmt: skip
        fork.arrival, fork.is_guessed = self.arrival, self.is_guessed
        fork.turn, fork.cached_tiers = self.turn, self.cached_tiers
        fork.arrived_at, fork.admitted_at, fork.has_begun = self.arrived_at, self.admitted_at, self.has_begun
        fork.rules, fork.num_scored = self.rules and self.rules.fresh(), self.num_scored
        return fork, copy

    def drop(self, index: int | None) -> bool:
        """Takes note that an answer is not wanted any more, with None all that it stands for; whether none is left."""
        if index is None or self.is_alone:
            return index in (None, self.index)
        self.dropped.add(index)
        return len(self.dropped) == self.num_answers

    def preempt(self) -> None:
        """Gives all its pages up; what it has written is read again with the prompt. No step may be under way."""
        assert not self.num_pending
        self.table.release()
        self.num_to_read, self.num_sent, self.found_at = len(self.token_ids), 0, -1
        self.was_preempted, self.is_guessed, self.is_parked = True, False, False
        self.lacks_room = self.lacks_share = False

    def _num_keys(self, num_tokens: int) -> int:
        """How many of the pages of its first tokens may have keys."""
        return (num_tokens if self.keeps_answer else min(num_tokens, self.prompt_len)) // self.table.page_size

    def _pages_at(self, length: int) -> int:
        """Pages of all answers that it stands for when each, with the prompt, has so many tokens."""
        return pages_of_answers(self.first_observed, length, self.num_answers, self.table.page_size)


Scheduled = list[tuple[Sequence, int]]
"""The sequences of a step, with the number of tokens that each runs."""


def most_pages(request: EngineRequest, page_size: int, num_answers: int, num_observed: int = 0) -> int:
    """Pages of so many answers at their full length; each has the last `num_observed` tokens of the prompt to itself,
    see `EngineInfo`."""
    prompt_len = len(request.prompt_token_ids)
    num_shared = max(0, prompt_len - num_observed)
    # the last token sampled is never read
    return pages_of_answers(num_shared, prompt_len + request.max_tokens - 1, num_answers, page_size)


def pages_of_answers(num_shared: int, length: int, num_answers: int, page_size: int) -> int:
    """Pages of so many answers of a length that counts the prompt, of which they share the full pages of the first
    tokens."""
    shared = num_shared // page_size
    return shared + num_answers * (pages_for(length, page_size) - shared)
