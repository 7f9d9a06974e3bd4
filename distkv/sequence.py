"""One answer that is being written: its tokens and its pages."""

from dataclasses import dataclass

from distkv.messages import EngineRequest
from distkv.storage.page_table import PageTable


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

    def fork(self, index: int) -> tuple["Sequence", tuple[int, int] | None]:
        """Another answer from the same state; also the page copy it needs, see `PageTable.fork`."""
        table, copy = self.table.fork()
        return Sequence(self.request, index, table, list(self.token_ids)), copy
