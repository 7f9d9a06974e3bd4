"""The pages whose keys may score highest: Quest, Query-Aware Sparsity for Efficient Long-Context LLM Inference,
https://arxiv.org/abs/2406.10774."""

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from distkv.workers.attention.policies.policy import Choice, Rows, check_count
from distkv.workers.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

DEFAULT_SHARE = 0.1
LEAST = 2  # the first page and the row's own


@dataclass(frozen=True)
class TopPages:
    """A row attends to so many of the pages up to its own, which is always among them, as the first one is: the others
    are those of the highest upper bounds of its scores, the earlier of two that are equal. The query heads of a KV head
    choose together, by the highest of their bounds."""

    share: float | None = None  # of the pages up to the row's own, rounded up; 0.1 if neither is given
    pages: int | None = None
    needs_summaries: ClassVar[bool] = True
    looks_at_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.share is not None and self.pages is not None:
            raise ConfigError("attention_policy top_pages: share and pages are both given; leave one of them out")
        if self.pages is not None:
            check_count("top_pages", "pages", self.pages, LEAST)
            return
        share = DEFAULT_SHARE if self.share is None else self.share
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
            raise ConfigError(f"attention_policy top_pages: share is {share!r}; use a number above 0 and at most 1")
        object.__setattr__(self, "share", float(share))

    def choose(self, rows: Rows) -> Choice:
        """See `PagePolicy`."""
        import numpy as np  # see policy.py

        bounds = rows.upper_bounds()
        choice = []
        for row, own in enumerate(rows.own_pages.tolist()):
            between = self.num_chosen(own + 1, rows.page_size) - LEAST  # pages behind the first and before its own
            if between >= own - 1:
                choice.append([np.arange(own + 1)] * rows.num_kv_heads)
            else:
                heads = (highest(bounds[row, head, 1:own], between) for head in range(rows.num_kv_heads))
                choice.append([np.concatenate([[0], 1 + chosen, [own]]) for chosen in heads])
        return choice

    def num_chosen(self, num_pages: int, page_size: int) -> int:
        """See `PagePolicy`."""
        if self.pages is not None:
            return min(num_pages, self.pages)
        part = Fraction(str(self.share)) * num_pages  # a float's product may lie a little above a whole number
        return min(num_pages, max(LEAST, -(-part.numerator // part.denominator)))


def highest(bounds: "np.ndarray", count: int) -> "np.ndarray":
    """The indexes of the `count` highest numbers of some more, rising; of equal ones the first."""
    import numpy as np

    if not count:
        return np.zeros(0, dtype=np.int64)
    bounds = np.nan_to_num(bounds, nan=np.inf)  # of keys that are no numbers, whose request ends
    least = np.partition(bounds, len(bounds) - count)[len(bounds) - count]
    chosen = bounds > least
    chosen[np.flatnonzero(bounds == least)[: count - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)
