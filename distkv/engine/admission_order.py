"""In which order waiting requests are admitted.

First come, first served within a priority, with one exception while held pages lie below the device: a request goes
ahead that shares most of its prompt with a running one. What they share is brought up once a step for both, so those
that ask about one long text run together, and a step streams one text for many of them, not many texts for a few each.
"""

from collections.abc import Iterator
from itertools import islice

from distkv.engine.sequence import Sequence
from distkv.storage.ledger.tiered_cache import TieredCache

MAX_LOOKED_AT = 1024  # waiting requests, from the first in line, that are looked at for those that may go ahead


class AdmissionOrder:
    """Has waiting requests go ahead of others, within bounds: while one is the first in line, at most `most_passes`
    others are admitted before it."""

    def __init__(self, cache: TieredCache, most_passes: int):
        self._cache, self._most_passes = cache, most_passes
        self._first: Sequence | None = None  # in line when one was admitted last
        self._num_passes = 0  # that were admitted before it since it is the first
        self._num_admitted = 0

    def line(self, waiting: list[Sequence]) -> Iterator[tuple[Sequence, bool]]:
        """All that wait, each once, and whether it goes ahead of others: then these need not wait for it if it cannot
        be admitted. The order follows what is admitted meanwhile (`note_admitted`).

        Args:
            waiting: by priority and arrival.
        """
        left = dict.fromkeys(waiting)
        num_seen = -1
        while left:
            if num_seen != self._num_admitted:  # else the same ones would be found as before
                num_seen = self._num_admitted
                for sequence in self._sharing(left):
                    if not self._may_pass(waiting[0]):
                        break
                    del left[sequence]
                    yield sequence, sequence is not waiting[0]
            first = next(iter(left), None)
            if first is not None:
                del left[first]
                yield first, False

    def note_admitted(self, sequence: Sequence, first: Sequence) -> None:
        """Takes note that one is about to leave the line, of which `first` is the first."""
        self._num_admitted += 1
        if first is not self._first:
            self._first, self._num_passes = first, 0
        self._num_passes += sequence is not first

    def _may_pass(self, first: Sequence) -> bool:
        return first is not self._first or self._num_passes < self._most_passes

    def _sharing(self, left: dict[Sequence, None]) -> list[Sequence]:
        """Those of the highest priority that share most of their prompt with a running request, while some pages of
        running ones are cold."""
        if not self._cache.has_cold:
            return []
        priority = next(iter(left)).request.priority
        looked_at = islice(left, MAX_LOOKED_AT)
        return [one for one in looked_at if one.request.priority == priority and self._shares_most(one)]

    def _shares_most(self, sequence: Sequence) -> bool:
        """Whether the middle page of what may be found of a prompt is held: then so are all before it."""
        num_pages = sequence.num_prefix_pages
        middle = num_pages // 2
        return num_pages > 0 and middle < len(sequence.keys) and self._cache.is_held(sequence.keys[middle])
