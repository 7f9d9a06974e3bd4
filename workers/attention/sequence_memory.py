"""What a policy of attention remembers of a sequence, from one step to the next."""

from collections.abc import Callable
from dataclasses import dataclass, field

from distkv.workers.attention.policies.policy import Memory
from distkv.workers.errors import DistKVError


@dataclass
class SequenceMemory:
    """One `Memory` for each layer, of all tokens that the policy observes up to a position. It is empty, and must be
    made anew from the first of these tokens on, until `begin` is called; and between `begin` and `end` as well, so that
    a step which raises leaves nothing behind that is true of some layers alone."""

    layers: list[Memory] = field(default_factory=list)
    position: int | None = None  # of the token that goes on from it; None where it is empty

    def begin(self, start: int, first: int, make: Callable[[], list[Memory]]) -> None:
        """Has the tokens from position `start` on go on from it.

        Args:
            first: the position of the first token that the policy observes. A step with that token starts afresh.
            make: makes what is remembered before that.

        Raises DistKVError where it does not know the tokens before, or knows others: the leader must have those read
        again first.
        """
        if start <= first:
            self.layers = make()
        elif self.position != start:
            known = "nothing" if self.position is None else f"the tokens before position {self.position}"
            raise DistKVError(
                f"a step goes on at position {start} of a sequence of which the policy of attention remembers {known}"
            )
        self.position = None

    def end(self, position: int) -> None:
        """Takes note that it knows the tokens before a position, in all layers."""
        self.position = position
