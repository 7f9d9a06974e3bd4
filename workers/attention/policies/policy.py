"""What a policy of attention is: of the pages before a token, those that its query heads attend to.

A policy is options in a frozen dataclass and one choice, and what it remembers if that depends on rows before; it knows
no kernel, and nothing of where pages lie. To add one, write its file in this folder and enter it in `registry.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from distkv.workers.errors import ConfigError

if TYPE_CHECKING:  # the leader parses policies, and has no torch; a plan has no numpy either, to be there at once
    import numpy as np
    from torch import Tensor

MOST = 2**31 - 1  # tokens or pages
Choice: TypeAlias = "list[list[np.ndarray]]"
"""By row and KV head, indexes of pages in their sequence, int64 and rising; the last one is the row's own page."""


@dataclass(frozen=True)
class Rows:
    """Tokens of one sequence that choose their pages in one layer.

    Dims: R rows, K KV heads of the rank, G query heads to each, P pages up to that of the last row, D head_dim.
    """

    positions: "np.ndarray"  # int64 [R], rising
    page_size: int
    num_kv_heads: int
    queries: "Tensor"  # [R, K * G, D]
    # of full pages, the mean keys of B blocks of tokens each: [P, B, K, D]; of what is not full yet, anything. Both
    # this and `expected_weights` are for policies with `needs_summaries`
    mean_keys: Callable[[], "Tensor"]
    # fp32 [R, K, P]: the softmax weights of queries over the mean keys of the pages before the row's own, summed over
    # those of a page and over the query heads of a KV head; of other pages, anything. What a row has is a function of
    # its queries and of these pages alone, bit for bit
    expected_weights: Callable[[], "np.ndarray"]

    @property
    def own_pages(self) -> "np.ndarray":
        """The index of the page of each row."""
        return self.positions // self.page_size


class PagePolicy(Protocol):
    """Which pages a token of an answer attends to: a `RowPolicy` or a `SequentialPolicy`.

    A choice must be a function of the request up to its token. So it is the same whatever else runs, and however many
    of the sequence's tokens a step computes.
    """

    needs_summaries: ClassVar[bool]

    def num_chosen(self, num_pages: int, page_size: int) -> int:
        """How many pages the last token of so many pages chooses at most, at least one."""


@runtime_checkable
class RowPolicy(PagePolicy, Protocol):
    """One whose choice is a function of the row: of its position, its queries and the pages up to it."""

    looks_at_queries: ClassVar[bool]  # else the choice is the same in all layers

    def choose(self, rows: Rows) -> Choice:
        """The pages of each row."""


class Memory(Protocol):
    """What a `SequentialPolicy` remembers of the rows of one sequence in one layer. Each row that it observes has one
    call of `observe`, in their order, and a row of the answer one of `choose` before it."""

    def choose(self, row: Rows) -> "list[np.ndarray]":
        """The pages of the one row given, by KV head, as in `Choice`."""

    def observe(self, weights: "list[np.ndarray]") -> None:
        """Takes in what a row has made of its pages, which are all up to its own for a row of the prompt.

        Args:
            weights: by KV head, fp64 of each page, the sums of the softmax weights that its query heads give to keys
                of the page; they add up to G.
        """


@runtime_checkable
class SequentialPolicy(PagePolicy, Protocol):
    """One whose choice follows from what rows before have attended to, and from nothing else of the sequence's past.
    What is remembered is made anew wherever the sequence is read again."""

    num_observed: ClassVar[int]  # the last tokens of the prompt, one at least, are observed, though they do not choose

    def begin(self, num_kv_heads: int) -> Memory:
        """What is remembered before the first row."""


def num_observed(policy: PagePolicy | None) -> int:
    """How many tokens at the end of a prompt a policy observes; 0 for one that remembers nothing."""
    return policy.num_observed if isinstance(policy, SequentialPolicy) else 0


def looks_at_queries(policy: PagePolicy | None) -> bool:
    """Whether what a policy chooses follows from queries, of the row itself or of those before it."""
    return isinstance(policy, SequentialPolicy) or (isinstance(policy, RowPolicy) and policy.looks_at_queries)


def name_of(policy: PagePolicy) -> str:
    """The policy as a user writes it, with all options that are set."""
    values: dict[str, Any] = {one.name: getattr(policy, one.name) for one in fields(policy)}  # type: ignore[arg-type]
    options = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    return f"{snake_case(type(policy).__name__)}({options})"


def snake_case(name: str) -> str:
    """SinkWindow -> sink_window."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def check_count(policy: str, option: str, value: object, least: int) -> None:
    """Raises ConfigError unless an option is a whole number from `least` to MOST."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"attention_policy {policy}: {option} is {value!r}; use a whole number, {least} or more")
    if value > MOST:
        raise ConfigError(f"attention_policy {policy}: {option} is {value}; use at most {MOST}")
