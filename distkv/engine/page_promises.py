"""Who of the running sequences may take more pages, so that all of them can end.

A request is not promised all pages that it may need at most: others could not run beside it, and most answers end long
before. It is promised that it can have them when those before it in line have ended. That is the banker's algorithm
(Dijkstra, EWD 108) for one resource, pages over all tiers, and one order, the line: a state is safe when the first can
have all that it may still need of the pages that are free, the second with those that the first gives back then, and so
on. A sequence whose next page would leave no safe state waits with the pages that it has.

What a request may need is known when it says `max_tokens`. Else it is guessed: as many tokens again as have been
written, MARGIN_TOKENS at least. A guess may prove wrong, and then the state is not safe any more. The first in line
goes on in any case; when not even that has room, a sequence whose need was guessed is preempted (`Scheduler.preempt`).
"""

from bisect import bisect
from collections import Counter
from dataclasses import dataclass, replace

from distkv.engine.sequence import Sequence
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.tiered_cache import TieredCache


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a sequence has and may need, in pages."""

    wants: int  # in the next step; while it reads its prompt, all that is reserved
    reserved: int  # for the rest of its prompt and its first token
    needs: int  # beyond those
    gives: int  # when it has ended, of those that it has

    def after_taking(self) -> "_Claim":
        """What is left when it has what it wants."""
        needs = max(0, self.needs - (self.wants - self.reserved))
        return replace(self, wants=0, reserved=0, needs=needs, gives=self.gives + self.wants)


class PagePromises:
    """Keeps the pages of running sequences in a safe state, see above."""

    def __init__(self, cache: TieredCache):
        self._cache = cache
        self._any_lacks = False

    @property
    def any_lacks_room(self) -> bool:
        """Whether a sequence waited for pages at the last review."""
        return self._any_lacks

    def review(self, running: list[Sequence], only: Sequence | None = None) -> None:
        """Sets `Sequence.lacks_room`; to be called once a step.

        Args:
            only: is to run alone, and counts as the first in line.
        """
        free = self._cache.capacity - self._cache.num_pages
        if self.num_promised(running) <= self._cache.capacity:
            if self._any_lacks:
                for one in running:
                    one.lacks_room = False
                self._any_lacks = False
            return
        line = sorted(running, key=lambda one: (one is not only, one.place))
        claims = _claims(line)
        self._any_lacks = False
        for index, (sequence, claim) in enumerate(zip(line, list(claims), strict=True)):
            after = [*claims[:index], claim.after_taking(), *claims[index + 1 :]]
            is_promised = not index or not claim.wants or claim.reserved > 0
            if claim.wants <= free and (is_promised or _is_safe(free - claim.wants, after)):
                claims, free = after, free - claim.wants
                sequence.lacks_room = False
            else:
                sequence.lacks_room = self._any_lacks = True

    def num_promised(self, running: list[Sequence]) -> int:
        """Distinct pages over all tiers that running sequences have or are expected to need."""
        return self._cache.num_pages + sum(max(0, one.expected_pages - len(one.table.pages)) for one in running)

    def can_end(self, running: list[Sequence], newcomer: Sequence, prefix: list[Page]) -> bool:
        """Whether running sequences and one more can all end, and the prompt of that one be read at once.

        Args:
            prefix: pages of the newcomer that are known.
        """
        free = self._cache.capacity - self._cache.num_pages
        num_held, start = num_held_pages(prefix), newcomer.first_pages
        claim = _Claim(0, start - num_held, max(0, newcomer.expected_pages - start), num_held - len(prefix))
        line = sorted(running, key=lambda one: one.place)
        claims = _claims(line)
        claims.insert(bisect(line, newcomer.place, key=lambda one: one.place), claim)
        return _is_safe(free, claims)


def num_held_pages(pages: list[Page]) -> int:
    """How many of them somebody holds."""
    return sum(page.references > 0 for page in pages)


def _claims(line: list[Sequence]) -> list[_Claim]:
    """The claims of sequences in order. What answers of a request share is given back with the last of them."""
    answers = Counter(one.arrival for one in line)
    left = answers.copy()
    claims = []
    for sequence in line:
        left[sequence.arrival] -= 1
        claims.append(_claim(sequence, 0 if left[sequence.arrival] else answers[sequence.arrival]))
    return claims


def _claim(sequence: Sequence, num_sharing: int) -> _Claim:
    """A sequence's claim, when pages of the prompt that so many hold are free once it has ended."""
    pages = sequence.table.pages
    reserved = max(0, sequence.first_pages - len(pages)) if sequence.is_prefilling else 0
    wants = reserved if sequence.is_prefilling else sequence.table.missing(1) * sequence.may_decode
    needs = max(0, sequence.expected_pages - len(pages) - reserved)
    shared = sequence.prompt_len // sequence.table.page_size
    gives = sum(page.references == num_sharing for page in pages[:shared])
    return _Claim(wants, reserved, needs, gives + sum(page.references == 1 for page in pages[shared:]))


def _is_safe(free: int, claims: list[_Claim]) -> bool:
    """Whether all can end one after the other, and prompts be read at once."""
    left = free - sum(claim.reserved for claim in claims)
    for claim in claims:
        if left < 0 or claim.needs > left:
            return False
        left += claim.gives + claim.reserved
    return True
