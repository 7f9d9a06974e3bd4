"""Pages that have been attended to of late; the others are let go: H2O, Heavy-Hitter Oracle for Efficient Generative
Inference of Large Language Models, https://arxiv.org/abs/2306.14048, and, for what the end of a prompt tells, SnapKV,
LLM Knows What You are Looking for Before Generation, https://arxiv.org/abs/2404.14469."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from distkv.workers.attention.policies.budget import checked_share, highest, pages_within
from distkv.workers.attention.policies.policy import MOST, Rows
from distkv.workers.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Decay:
    """In each layer and KV head a page has a mass: the softmax weight that rows have given to it, summed over the query
    heads of the group, of which each row's counts half as much `half_life` rows later. The last rows of the prompt are
    the first to give it. Before a row of the answer attends, the pages of least mass are let go until so many are left
    as the budget allows, the later of two that are equal first; nothing behind it attends to them any more. The first
    page always stays, and half of the budget is for the newest of those that are left: what has only come had no time
    to be given mass."""

    share: float | None = None  # of the pages up to the row's own, rounded up; 0.1 if neither is given
    pages: int | None = None
    half_life: float = 16.0  # rows
    needs_summaries: ClassVar[bool] = False
    num_observed: ClassVar[int] = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", checked_share("decay", self.share, self.pages))
        life = self.half_life
        if not isinstance(life, (int, float)) or isinstance(life, bool) or not 0 < life <= MOST:
            raise ConfigError(
                f"attention_policy decay: half_life is {life!r}; use a number of tokens above 0, at most {MOST}"
            )
        object.__setattr__(self, "half_life", float(life))

    def begin(self, num_kv_heads: int) -> "Masses":
        """See `SequentialPolicy`."""
        return Masses(self, num_kv_heads)

    def num_chosen(self, num_pages: int, page_size: int) -> int:
        """See `PagePolicy`."""
        return pages_within(self.share, self.pages, num_pages)


class Masses:
    """A `Memory`. All heads have let go as many pages."""

    def __init__(self, policy: Decay, num_kv_heads: int):
        import numpy as np  # see policy.py

        self._policy, self._factor = policy, 0.5 ** (1 / policy.half_life)
        self._num_pages = 0  # up to that of the last row
        self._kept = np.zeros((num_kv_heads, 0), dtype=np.int64)  # their indexes, rising
        self._masses = np.zeros((num_kv_heads, 0))

    def choose(self, row: Rows) -> "list[np.ndarray]":
        """See `Memory`."""
        [own] = row.own_pages.tolist()
        self._add_pages(own + 1)
        budget = self._policy.num_chosen(own + 1, row.page_size)
        if self._kept.shape[1] > budget:
            self._let_go(budget)
        return list(self._kept)

    def observe(self, weights: "list[np.ndarray]") -> None:
        """See `Memory`."""
        import numpy as np

        given = np.stack(weights)
        if given.shape[1] > self._kept.shape[1]:  # a row of the prompt in a page of its own
            self._add_pages(given.shape[1])
        self._masses = self._masses * self._factor + given

    def _add_pages(self, num_pages: int) -> None:
        """Takes in those that are new when there are so many."""
        import numpy as np

        shape = len(self._kept), num_pages - self._num_pages
        new = np.broadcast_to(np.arange(self._num_pages, num_pages), shape)
        self._kept = np.concatenate([self._kept, new], axis=1)
        self._masses = np.concatenate([self._masses, np.zeros(shape)], axis=1)
        self._num_pages = num_pages

    def _let_go(self, budget: int) -> None:
        """Leaves so many pages."""
        import numpy as np

        num_kept, num_newest = self._kept.shape[1], budget // 2
        newest = np.arange(num_kept - num_newest, num_kept)
        stay = np.stack([
            np.concatenate([[0], 1 + highest(masses, budget - 1 - num_newest), newest])
            for masses in self._masses[:, 1 : num_kept - num_newest]
        ])  # fmt: skip
        self._kept = np.take_along_axis(self._kept, stay, axis=1)
        self._masses = np.take_along_axis(self._masses, stay, axis=1)
