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

Where a tenant has a share (`Shares`), its sequences are a line of their own as well, over the pages of that share, and
take what both lines let them. A state that is safe for the line of all and for that of each tenant is one in which all
can end, in the order of the line of all: whoever a sequence waits for is before it in both. The first of a tenant goes
on in any case as far as the share is concerned, so that a wrong guess takes a tenant past its share for the time of one
request, and nobody is preempted for it.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

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
        self.are_met = True  # there is room for all that running sequences were promised, at the same time
        self._cache = cache

    def review(self, running: list[Sequence], only: Sequence | None = None) -> None:
        """Sets `Sequence.lacks_room` and `lacks_share`; to be called once a step.

        Args:
            only: is to run alone, and counts as the first in line.
        """
        for one in running:
            one.lacks_room = one.lacks_share = False
        self.are_met = not self._cache.has_shares and self.num_promised(running) <= self._cache.capacity
        if self.are_met:
            return
        line = sorted(running, key=lambda one: (one is not only, one.place))
        everybody = self._line_of(line, self._all)
        of_tenants: dict[bytes | None, list[Sequence]] = {}
        for one in line if self._cache.has_shares else []:
            of_tenants.setdefault(one.table.tenant, []).append(one)
        tenants = {tenant: self._line_of(own, self._of(tenant)) for tenant, own in of_tenants.items()}
        if everybody is None and not any(tenants.values()):
            return
        for sequence in line:
            own_line = tenants.get(sequence.table.tenant)
            has_share = own_line is None or own_line.may_take(sequence, is_strict=False)
            has_room = everybody is None or everybody.may_take(sequence)
            for lane in (own_line, everybody):
                if lane is not None and has_share and has_room:
                    lane.take(sequence)
            sequence.lacks_room = not (has_share and has_room)
            sequence.lacks_share = has_room and not has_share

    def num_promised(self, running: list[Sequence]) -> int:
        """Distinct pages over all tiers that running sequences have or are expected to need."""
        return _num_promised(running, self._all)

    def may_begin(self, running: list[Sequence], newcomer: Sequence, prefix: list[Page]) -> bool:
        """Whether a sequence may run beside the others: its prompt can be read at once, all can end, nobody before it
        waits for pages, and nobody is likely to.

        Args:
            prefix: pages of the newcomer that are known.
        """
        return _may_begin([one for one in running if not one.lacks_share], running, newcomer, prefix, self._all)

    def has_share(self, running: list[Sequence], newcomer: Sequence, prefix: list[Page]) -> bool:
        """The same as far as its tenant's share is concerned."""
        if not self._cache.has_shares:
            return True
        own = [one for one in running if one.table.tenant == newcomer.table.tenant]
        return _may_begin(own, own, newcomer, prefix, self._of(newcomer.table.tenant))

    @property
    def _all(self) -> "_Room":
        return _Room(self._cache.capacity, self._cache.num_pages)

    def _of(self, tenant: bytes | None) -> "_Room":
        return _Room(self._cache.share_capacity, self._cache.num_pages_of(tenant))

    def _line_of(self, line: list[Sequence], room: "_Room") -> "_Line | None":
        """None where there is room for all that is promised."""
        return None if _num_promised(line, room) <= room.capacity else _Line(line, room)


class _Room(NamedTuple):
    """Distinct pages over all tiers that some sequences may hold, and those that they do."""

    capacity: int
    num_held: int


class _Line:
    """Sequences in order, what they claim of some room, and what is free of that."""

    def __init__(self, line: list[Sequence], room: _Room):
        self._places = {sequence: index for index, sequence in enumerate(line)}
        self._claims = _claims(line)
        self._free = room.capacity - room.num_held

    def may_take(self, sequence: Sequence, is_strict: bool = True) -> bool:
        """Whether all can still end when a sequence has what it wants; the first may have it, if it is there, and where
        this is not strict in any case."""
        index = self._places[sequence]
        claim = self._claims[index]
        if claim.wants > self._free:
            return not index and not is_strict
        if not index or not claim.wants or claim.reserved > 0:
            return True
        after = [*self._claims[:index], claim.after_taking(), *self._claims[index + 1 :]]
        return _is_safe(self._free - claim.wants, after)

    def take(self, sequence: Sequence) -> None:
        """Takes note that it has it."""
        index = self._places[sequence]
        self._free -= self._claims[index].wants
        self._claims[index] = self._claims[index].after_taking()


def _may_begin(
    in_the_way: list[Sequence], running: list[Sequence], newcomer: Sequence, prefix: list[Page], room: _Room
) -> bool:
    """See `PagePromises.may_begin`.

    Args:
        in_the_way: of the running ones, those for whose pages the newcomer is to wait.
    """
    if any(one.lacks_room and newcomer.place > one.place for one in in_the_way):
        return False
    num_held = num_held_pages(prefix)
    if _num_promised(running, room) + newcomer.expected_pages - num_held <= room.capacity:
        return True
    ahead = [one for one in running if one.place < newcomer.place]
    if ahead and _num_likely(ahead, room) + newcomer.likely_pages - num_held > room.capacity:
        return False
    free = room.capacity - room.num_held
    if newcomer.first_pages - num_held > free:
        return False
    line = sorted([*running, newcomer], key=lambda one: one.place)
    return _is_safe(free, _claims(line, newcomer, prefix))


def _num_promised(running: list[Sequence], room: _Room) -> int:
    """Distinct pages that these have or are expected to need."""
    return room.num_held + sum(max(0, one.expected_pages - len(one.table.pages)) for one in running)


def _num_likely(running: list[Sequence], room: _Room) -> int:
    """Distinct pages that are held, or are likely to be needed by these."""
    return room.num_held + sum(max(0, one.likely_pages - len(one.table.pages)) for one in running)


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
