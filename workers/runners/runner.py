"""Runs the steps of a rank, by one kind of kernels."""

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from distkv.workers.page_directory import SequenceStep

Receive = Callable[[], Tensor]
"""Waits for the hidden states `[T, E]` that the stage before has of a step's tokens."""


class Runner(Protocol):
    """Runs steps over the pools of a rank."""

    def run(self, steps: list[SequenceStep], sampled: Tensor | None, receive: Receive | None = None) -> Tensor:
        """The hidden states `[rows, E]` whose logits are wanted, or those of all tokens, see `LlamaModel.forward`.
        Waits for nothing on the device, but with gloo.

        Args:
            sampled: what the step before sampled, int64 on the device, where token ids refer to it.
            receive: behind the first stage. It is called once, when the step is planned and cold pages are on their
                way, which so take none of the time that the stages before need.
        """

    def warm_up(self) -> Iterator[None]:
        """Does what would delay the first steps; yields `num_parts` times. Afterwards device pages hold anything."""

    def compile_rest(self) -> None:
        """Begins, in threads, what only few steps need. To be called once, after `warm_up`."""

    def close(self) -> None:
        """Lets go of what a group's collectives are part of; nothing runs any more."""

    @property
    def num_parts(self) -> int:
        """See `warm_up`."""
