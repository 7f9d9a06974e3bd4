"""The first tokens of a sequence and its newest ones: Efficient Streaming Language Models with Attention Sinks,
https://arxiv.org/abs/2309.17453."""

from dataclasses import dataclass
from typing import ClassVar

from distkv.workers.attention.policies.policy import Choice, Rows, check_count


@dataclass(frozen=True)
class SinkWindow:
    """Tokens are rounded up to whole pages: a row attends to the pages that hold any of the first `sinks` tokens or any
    of the newest `window` ones, itself included. Positions stay what they are; the paper counts anew within what is
    left, which a model needs beyond the length that it was made for."""

    sinks: int = 4
    window: int = 4096
    needs_summaries: ClassVar[bool] = False
    looks_at_queries: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("sink_window", "sinks", self.sinks, 0)
        check_count("sink_window", "window", self.window, 1)

    def choose(self, rows: Rows) -> Choice:
        """See `PagePolicy`."""
        import numpy as np  # see policy.py

        num_sinks = -(-self.sinks // rows.page_size)
        firsts = np.maximum(rows.positions + 1 - self.window, 0) // rows.page_size
        choice = []
        for first, own in zip(firsts.tolist(), rows.own_pages.tolist(), strict=True):
            pages = np.concatenate([np.arange(min(num_sinks, first)), np.arange(first, own + 1)])
            choice.append([pages] * rows.num_kv_heads)
        return choice

    def num_chosen(self, num_pages: int, page_size: int) -> int:
        """See `PagePolicy`."""
        return min(num_pages, -(-self.sinks // page_size) + -(-self.window // page_size) + 1)
