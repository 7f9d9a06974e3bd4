"""Who of the running sequences may take more pages, so that all of them can end.

A request is not promised all pages that it may need at most: others could not run beside it, and most answers end long
before. It is promised that it can have them when those before it in line have ended. That is the banker's algorithm
(Dijkstra, EWD 108) for one resource, pages over all tiers, and one order, the line: a state is safe when the first can
have all that it may still need of the pages that are free, the second with those that the first gives back then, and so
on. A sequence whose next page would leave no safe state waits with the pages that it has.

What a request may need is known when it says `max_tokens`. Else it is guessed by the answers before it
(`AnswerLengths`). A guess may prove wrong, and then the state is not safe any more. The first in line goes on in any
case; when not even that has room, a sequence whose need was guessed is preempted (`Scheduler.preempt`).

Many states are safe in which most of those that run wait with the pages of their prompts, and hold back the few that
are first in line. So a request begins beside others only while all of them are likely to have room together.
"""

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

    def review(self, running: list[Sequence], only: Sequence | None = None) -> None:
        """Sets `Sequence.lacks_room`; to be called once a step.

        Args:
            only: is to run alone, and counts as the first in line.
        """
        for one in running:
            one.lacks_room = False
        if self.num_promised(running) <= self._cache.capacity:
            return
        line = sorted(running, key=lambda one: (one is not only, one.place))
        claims = _claims(line)
        free = self._cache.capacity - self._cache.num_pages
        for index, sequence in enumerate(line):
            claim = claims[index]
            after = [*claims[:index], claim.after_taking(), *claims[index + 1 :]]
            is_promised = not index or not claim.wants or claim.reserved > 0
            if claim.wants <= free and (is_promised or _is_safe(free - claim.wants, after)):
                claims, free = after, free - claim.wants
            else:
                sequence.lacks_room = True

    def num_promised(self, running: list[Sequence]) -> int:
        """Distinct pages over all tiers that running sequences have or are expected to need."""
        return self._cache.num_pages + sum(max(0, one.expected_pages - len(one.table.pages)) for one in running)

    def _num_likely(self, running: list[Sequence]) -> int:
        """Distinct pages over all tiers that are held, or are likely to be needed by these."""
        return self._cache.num_pages + sum(max(0, one.likely_pages - len(one.table.pages)) for one in running)

    def may_begin(self, running: list[Sequence], newcomer: Sequence, prefix: list[Page]) -> bool:
        """Whether a sequence may run beside the others: its prompt can be read at once, all can end, nobody before it
        waits for pages, and nobody is likely to.

        Args:
            prefix: pages of the newcomer that are known.
        """
        if any(one.lacks_room and newcomer.place > one.place for one in running):
            return False
        num_held = num_held_pages(prefix)
        if self.num_promised(running) + newcomer.expected_pages - num_held <= self._cache.capacity:
            return True
        ahead = [one for one in running if one.place < newcomer.place]
        if ahead and self._num_likely(ahead) + newcomer.likely_pages - num_held > self._cache.capacity:
            return False
        free = self._cache.capacity - self._cache.num_pages
        if newcomer.first_pages - num_held > free:
            return False
        line = sorted([*running, newcomer], key=lambda one: one.place)
        return _is_safe(free, _claims(line, newcomer, prefix))


def num_held_pages(pages: list[Page]) -> int:
    """How many of them somebody holds."""
    return sum(page.references > 0 for page in pages)


def _claims(line: list[Sequence], newcomer: Sequence | None = None, prefix: list[Page] | None = None) -> list[_Claim]:
    """The claims of sequences in order, one of which may be about to begin with a prefix. What several hold is given
    back with the last of them."""
    claims = []
    given: set[Page] = set()
    for sequence in reversed(line):
        pages = (prefix or []) if sequence is newcomer else sequence.table.pages
        reserved = max(0, sequence.first_pages - len(pages)) if sequence.is_prefilling else 0
        wants = reserved if sequence.is_prefilling else sequence.table.missing(1) * sequence.may_decode
        needs = max(0, sequence.expected_pages - len(pages) - reserved)
        reserved += len(pages) - num_held_pages(pages)  # of a newcomer's prefix, what nobody holds is free now
        gives = [page for page in pages if page.references and page not in given]
        given.update(page for page in gives if page.references > 1 or newcomer is not None)
        claims.append(_Claim(wants, reserved, needs, len(gives)))
    return claims[::-1]


def _is_safe(free: int, claims: list[_Claim]) -> bool:
    """Whether all can end one after the other, and prompts be read at once."""
    left = free - sum(claim.reserved for claim in claims)
    for claim in claims:
        if left < 0 or claim.needs > left:
            return False
        left += claim.gives + claim.reserved
    return True
