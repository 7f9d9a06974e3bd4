"""What a draft model has read of each sequence, and in which pages. Without a tensor."""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

from distkv.storage.paging import pages_for


@dataclass(eq=False)
class DraftContext:
    """Of one sequence."""

    token_ids: list[int] = field(default_factory=list)  # whose keys and values are there, drafted ones among them
    num_certain: int = 0  # of these, those that were no draft
    slots: list[int] = field(default_factory=list)  # of its pages, in logical order

    def agree(self, token_ids: list[int]) -> int:
        """Lets go of what was drafted in vain; returns how many of the sequence's tokens are there. The newest one is
        to be run for what follows it, so it never counts."""
        most = min(len(self.token_ids), len(token_ids) - 1)
        count = min(self.num_certain, most)
        while count < most and self.token_ids[count] == token_ids[count]:
            count += 1
        del self.token_ids[count:]
        self.num_certain = count
        return count


class DraftContexts:
    """Those of all sequences. The pages are shared out to whoever drafted last; who finds none is not drafted for."""

    def __init__(self, num_pages: int, page_size: int):
        self._page_size = page_size
        self._free = list(range(num_pages))[::-1]
        self._contexts: OrderedDict[int, DraftContext] = OrderedDict()  # who drafted last comes last

    def of(self, number: int) -> DraftContext:
        """The context of a sequence, empty at first."""
        context = self._contexts.setdefault(number, DraftContext())
        self._contexts.move_to_end(number)
        return context

    def grow(self, number: int, num_tokens: int, keeps: Collection[int]) -> list[int] | None:
        """Gives a sequence pages for so many tokens; returns the slots that are new to it, or None where there is no
        room, and then it has none.

        Args:
            keeps: sequences that must not give up theirs.
        """
        context = self.of(number)
        missing = pages_for(num_tokens, self._page_size) - len(context.slots)
        for other in list(self._contexts):
            if len(self._free) >= missing:
                break
            if other != number and other not in keeps:
                self.forget([other])
        if len(self._free) < missing:
            self.forget([number])
            return None
        new = [self._free.pop() for _ in range(missing)]
        context.slots += new
        return new

    def forget(self, numbers: Collection[int]) -> None:
        """Takes back the pages of sequences."""
        for number in numbers:
            if (context := self._contexts.pop(number, None)) is not None:
                self._free += context.slots
