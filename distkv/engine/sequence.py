"""One answer that is being written: its tokens and its pages."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from distkv.engine.protocol import EngineRequest
from distkv.storage.ledger.page import Page, PageKey
from distkv.storage.ledger.page_table import PageTable
from distkv.storage.ledger.prefix_index import page_key
from distkv.storage.paging import pages_for
from distkv.storage.random_pages import page_seed
from distkv.workers.group.step_plan import SequencePlan


@dataclass(eq=False)
class Sequence:
    """Answer `index` of a request. The keys and values of its first `table.num_tokens` tokens are in the pages, or will
    be when the steps under way have ended."""

    request: EngineRequest
    index: int
    number: int  # of its page table on the ranks; rises with arrival
    table: PageTable
    token_ids: list[int]  # prompt and answer
    root: bytes | None  # of the chain of page names; None when its pages are its own
    keys: list[PageKey] = field(default_factory=list)  # of its first full pages
    num_pending: int = 0  # tokens that steps draw which are not known yet
    num_told: int = 0  # pages that the ranks' table holds
    num_cached: tuple[int, int, int] = (0, 0, 0)  # tokens whose KV was found, by tier
    expected: list[Page] = field(default_factory=list)  # what was found when it was queued
    awaits: "Sequence | None" = None  # computes a page that this one shares; it is not admitted before that is done
    is_parked: bool = False  # waits, so that others need not stream beside it
    turn: int = 0  # those of a lower turn go first, see `ColdBudget`
    turn_steps: int = 0
    finished: bool = False

    def __post_init__(self) -> None:
        self.prompt_len = len(self.request.prompt_token_ids)
        # full pages of the prompt without its last token, which must be run for its logits
        self.num_prefix_pages = (self.prompt_len - 1) // self.table.page_size
        # tokens of the prompt whose keys and values are random, see `EngineRequest.random_kv_seed`; whole pages
        is_random = self.request.random_kv_seed is not None
        self.num_random_in_all = self.num_prefix_pages * self.table.page_size if is_random else 0

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def in_prompt(self) -> bool:
        """Whether steps that read the prompt are still to come."""
        return self.table.num_tokens < self.prompt_len

    @property
    def num_answers(self) -> int:
        """Answers that this sequence stands for: all of its request's until they are forked off it."""
        return 1 if self.num_output_tokens else self.request.params.n

    @property
    def is_drawn_once(self) -> bool:
        """Whether the next draw is for this answer alone, not for all answers of a request whose prompt is read."""
        return self.num_answers == 1

    @property
    def may_decode(self) -> bool:
        """Whether a step may take the answer's newest token, drawn already or by a step under way."""
        drawn = len(self.token_ids) - self.prompt_len
        return 0 < drawn + self.num_pending < self.request.max_tokens and (drawn > 0 or self.request.params.n == 1)

    @property
    def most_pages(self) -> int:
        """Pages that the request may need at most, over all answers that this sequence stands for."""
        return most_pages(self.request, self.table.page_size, self.num_answers)

    @property
    def num_random(self) -> int:
        """Tokens with random keys and values that are still to come."""
        return max(0, self.num_random_in_all - self.table.num_tokens)

    def num_fork_pages(self, count: int) -> int:
        """Pages that the other answers of the request need once `count` more tokens have been read: a copy each of the
        last page of the prompt, unless that is full."""
        ends = self.table.num_tokens + count == self.prompt_len
        return self.request.params.n - 1 if ends and self.prompt_len % self.table.page_size else 0

    def by_importance(self) -> Iterator[Page]:
        """Its pages in the order in which they are best kept near: the first, then the newest."""
        yield from self.table.pages[:1]
        yield from reversed(self.table.pages[1:])

    def will_compute(self, index: int, key: PageKey) -> bool:
        """Whether steps that are still to end will fill the page of that place and name."""
        is_ahead = self.table.num_committed // self.table.page_size <= index < len(self.keys)
        return is_ahead and not self.finished and self.keys[index].digest == key.digest

    def page_keys(self, num_tokens: int) -> list[PageKey] | None:
        """The names of the full pages of its first tokens, at least; None when its pages are its own."""
        if self.root is None:
            return None
        assert num_tokens <= len(self.token_ids), "a name takes the tokens themselves"
        size = self.table.page_size
        for index in range(len(self.keys), num_tokens // size):
            parent = self.keys[-1].digest if self.keys else self.root
            self.keys.append(page_key(parent, self.token_ids[index * size : (index + 1) * size]))
        return self.keys

    def plan(self, start: int, count: int, num_logits: int, late: int | None = None) -> SequencePlan:
        """Its part of a step; tells the ranks of pages that they do not know yet, too. `late` is the number of the draw
        that it runs, of the step before, when the token is not known yet."""
        end, told = start + count, self.num_told
        token_ids = self.token_ids[start:end] if late is None else [-1 - late]
        assert len(token_ids) == count
        pages: list[int] = []
        if end > told * self.table.page_size:
            self.num_told = pages_for(end, self.table.page_size)
            pages = [page.id for page in self.table.pages[told : self.num_told]]
        return SequencePlan(self.number, token_ids, start, self.prompt_len, num_logits, told, pages)

    def ending(self, eos_token_ids: tuple[int, ...]) -> tuple[str | None, int | None]:
        """Why the answer ends with its newest token, if it does, and the token that was asked to stop it."""
        token, params = self.token_ids[-1], self.request.params
        if not params.ignore_eos and token in eos_token_ids:
            return "stop", None
        if token in (params.stop_token_ids or ()):
            return "stop", token
        return ("length" if self.num_output_tokens >= self.request.max_tokens else None), None

    def page_seed(self, page: Page) -> int:
        """Of a page of random keys and values."""
        assert self.request.random_kv_seed is not None
        return page_seed(self.request.random_kv_seed, page.index)

    def rewind(self, count: int) -> None:
        """Takes back what a step with `count` of its tokens was to do."""
        self.table.rewind(count)
        self.num_told = min(self.num_told, len(self.table.pages))

    def commit(self, count: int) -> None:
        """Tells that a step with `count` of its tokens has ended well."""
        table = self.table
        if table.num_committed % table.page_size + count < table.page_size:
            table.num_committed += count
        else:
            table.commit(count, self.page_keys(table.num_committed + count))

    def fork(self, index: int, number: int) -> tuple["Sequence", tuple[Page, Page] | None]:
        """Another answer from the same state; also the page copy it needs, see `PageTable.fork`."""
        table, copy = self.table.fork()
        fork = Sequence(self.request, index, number, table, list(self.token_ids), self.root, list(self.keys))
        fork.turn, fork.num_cached = self.turn, self.num_cached
        return fork, copy


Chosen = list[tuple[Sequence, int]]
"""The sequences of a step, with the number of tokens that each runs."""


def most_pages(request: EngineRequest, page_size: int, num_answers: int) -> int:
    """Pages of so many answers at their full length, the prompt's full pages counted once."""
    prompt_len = len(request.prompt_token_ids)
    shared = prompt_len // page_size
    # the last token drawn is never read
    longest = pages_for(prompt_len + request.max_tokens - 1, page_size)
    return shared + num_answers * (longest - shared)
