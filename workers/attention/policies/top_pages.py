"""The pages on which most attention is expected, for each token and KV head, as in Quest: Query-Aware Sparsity for
Efficient Long-Context LLM Inference, https://arxiv.org/abs/2406.10774, but by their mean keys, as in MoBA: Mixture of
Block Attention for Long-Context LLMs, https://arxiv.org/abs/2502.13189. Quest's bounds of scores, by the least and the
largest key of each channel, find less, see docs/quality.md."""

from dataclasses import dataclass
from typing import ClassVar

from distkv.workers.attention.policies.budget import LEAST, checked_share, highest, pages_within
from distkv.workers.attention.policies.policy import Choice, Rows


@dataclass(frozen=True)
class TopPages:
    """A row attends to so many of the pages up to its own, which is always among them, as the first one is: the others
    are those with the most softmax weight if the keys of each block of tokens were their mean, the earlier of two that
    are equal. The query heads of a KV head choose together, by the sum of their weights."""

    share: float | None = None  # of the pages up to the row's own, rounded up; 0.1 if neither is given
    pages: int | None = None
    needs_summaries: ClassVar[bool] = True
    looks_at_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", checked_share("top_pages", self.share, self.pages))

    def choose(self, rows: Rows) -> Choice:
        """See `PagePolicy`."""
        import numpy as np  # see policy.py

        weights = rows.expected_weights()
        choice = []
        for row, own in enumerate(rows.own_pages.tolist()):
            between = self.num_chosen(own + 1, rows.page_size) - LEAST  # pages behind the first and before its own
            if between >= own - 1:
                choice.append([np.arange(own + 1)] * rows.num_kv_heads)
            else:
                heads = (highest(weights[row, head, 1:own], between) for head in range(rows.num_kv_heads))
                choice.append([np.concatenate([[0], 1 + chosen, [own]]) for chosen in heads])
        return choice

    def num_chosen(self, num_pages: int, page_size: int) -> int:
        """See `PagePolicy`."""
        return pages_within(self.share, self.pages, num_pages)
