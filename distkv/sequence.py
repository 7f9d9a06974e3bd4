"""One answer that is being written: its tokens and its pages."""

from collections.abc import Iterator
from dataclasses import dataclass

from distkv.messages import EngineRequest
from distkv.storage.page_table import PageTable
from distkv.storage.tiered_cache import Page


@dataclass(eq=False)
class Sequence:
    """Answer `index` of a request. The keys and values of its first `table.num_tokens` tokens are in the pages."""

    request: EngineRequest
    index: int
    table: PageTable
    token_ids: list[int]  # prompt and answer

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_pending(self) -> int:
        """Tokens that the model has not read yet: the rest of the prompt, or the token drawn last."""
        return len(self.token_ids) - self.table.num_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def in_prompt(self) -> bool:
        """Whether the prompt is still being read."""
        return self.num_output_tokens == 0

    @property
    def num_random_in_all(self) -> int:
        """Tokens of the prompt whose keys and values are random, see `EngineRequest.random_kv_seed`; whole pages."""
        if self.request.random_kv_seed is None:
            return 0
        return (self.prompt_len - 1) // self.table.page_size * self.table.page_size

    @property
    def num_random(self) -> int:
        """Those of them that are still to come."""
        return max(0, self.num_random_in_all - self.table.num_tokens)

    def num_fork_pages(self, count: int) -> int:
        """Pages that the other answers of the request need once `count` more tokens have been read: a copy each of the
        last page of the prompt, unless that is full."""
        if not self.in_prompt or count < self.num_pending or self.prompt_len % self.table.page_size == 0:
            return 0
        return self.request.params.n - 1

    def by_importance(self) -> Iterator[Page]:
        """Its pages in the order in which they are best kept near: the first, then the newest."""
        yield from self.table.pages[:1]
        yield from reversed(self.table.pages[1:])

    def fork(self, index: int) -> tuple["Sequence", tuple[Page, Page] | None]:
        """Another answer from the same state; also the page copy it needs, see `PageTable.fork`."""
        table, copy = self.table.fork()
        return Sequence(self.request, index, table, list(self.token_ids)), copy
