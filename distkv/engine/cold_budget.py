"""Which of the running sequences take part in the next steps, when their cold pages are more than a step should stream.

Sequences that wait are parked: their pages leave the device first, so that those which run stream less. The choice is
reviewed now and then, not every step, and turns are long, so that sequences do not push each other out all the time.
"""

import math

from distkv.engine.protocol import EngineInfo
from distkv.engine.sequence import Sequence
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.tier import DEVICE, HOST
from distkv.workers.attention.policies.registry import parse_policy

REVIEW_STEPS = 16  # between two reviews, unless sequences come or go, or so many pages move that the limit is in doubt
DOUBT_STEPS = 2  # between two reviews at least in that case
TURN_STEPS = 128  # after which a sequence goes behind those that wait
RETURN_SHARE = 0.9  # of the budget: what a parked sequence must fit into to run beside others
OWN_SHARE = 0.25  # see `ColdBudget`


class ColdBudget:
    """Keeps the cold bytes of a step under `EngineInfo.max_cold_bytes_per_step`, 0 for no limit. The first in line
    always runs, whatever it streams, and so do sequences that stream nothing. Where the first exceeds the limit, so do
    those that share its pages, such as questions about one text, as long as what they stream beside these is little:
    OWN_SHARE of what each shares at most, and all together of what the first streams."""

    def __init__(self, info: EngineInfo, cache: TieredCache):
        self._limit = info.max_cold_bytes_per_step / info.cold_page_bytes  # pages
        self._disk_cost = info.disk_cost
        self._cache = cache
        self._policy = parse_policy(info.attention_policy)
        self._steps = 0  # since the last review
        self._slack = 0.0  # pages under the limit that were left then; fewer by what has moved since
        self._members: list[Sequence] = []  # of the last review
        self._any_parked = False

    @property
    def is_steady(self) -> bool:
        """Whether it is worth while to look for pages to bring up: with parked sequences, after a review only."""
        return not self._any_parked or not self._steps

    def note_relocated(self, num_pages: int) -> None:
        """Takes note that so many held pages lie elsewhere now."""
        self._slack -= num_pages * self._disk_cost

    def review(self, running: list[Sequence]) -> None:
        """Sets `Sequence.is_parked`; to be called once a step. Those that lack room have no part."""
        if not self._limit or not self._cache.has_cold:
            if self._any_parked:
                self._unpark(running)
            return
        self._steps += 1
        ready = [sequence for sequence in running if not sequence.lacks_room]
        in_doubt = self._slack < 0 and self._steps >= DOUBT_STEPS
        if self._steps < REVIEW_STEPS and ready == self._members and not in_doubt:
            return
        self._give_turns(ready)
        self._choose(ready)
        self._any_parked = any(sequence.is_parked for sequence in running)
        self._members, self._steps = ready, 0

    def _give_turns(self, running: list[Sequence]) -> None:
        newest = max((sequence.turn for sequence in self._members), default=0)
        known = set(self._members)
        for sequence in running:
            if sequence not in known:
                sequence.turn = max(sequence.turn, newest)
            elif not sequence.is_parked:
                sequence.turn_steps += self._steps
                if self._any_parked and sequence.turn_steps >= TURN_STEPS:
                    sequence.turn, sequence.turn_steps = newest + 1, 0

    def _choose(self, running: list[Sequence]) -> None:
        line = sorted(running, key=lambda one: (one.request.priority, one.turn, one.number))
        streamed: set[Page] = set()
        total = most_shared = 0.0
        for index, sequence in enumerate(line):
            returns = RETURN_SHARE if sequence.is_parked else 1
            limit, most = self._limit * returns, max(self._limit, most_shared) * returns
            # all of the first's, however many: those that share them do not stream them again
            cold, cost, num_shared = self._cold_pages(sequence, streamed, most - total if index else math.inf)
            if not index:
                most_shared = cost * (1 + OWN_SHARE)
            shares = len(cold) <= OWN_SHARE * num_shared
            runs = not index or not cost or total + cost <= (most if shares else limit)
            if runs:
                total += cost
                if self._share(sequence) == 1:
                    streamed.update(cold)  # else the others choose for themselves
                if sequence.is_parked:
                    self._cache.unpark(sequence.table.pages)
            else:
                self._cache.park(sequence.table.pages)
            sequence.is_parked = not runs
        self._slack = max(0.0, self._limit - total)  # the first may be above the limit by itself

    def _cold_pages(self, sequence: Sequence, streamed: set[Page], limit: float) -> tuple[list[Page], float, int]:
        """The pages that a sequence streams and no other does, and what they cost, in pages of the host; not all of
        them where they cost more than the limit, since a context may have a million. Also how many it shares."""
        cold: list[Page] = []
        num_shared = 0
        cost, share = 0.0, self._share(sequence)
        for page in sequence.table.pages:
            if page.slots[DEVICE] is not None and page.filling[DEVICE] is None:
                continue
            if page in streamed:
                num_shared += 1
                continue
            cold.append(page)
            cost += share * (1.0 if page.has(HOST) else self._disk_cost)
            if cost > limit:
                break
        return cold, cost, num_shared

    def _share(self, sequence: Sequence) -> float:
        """The part of its pages that its next step is expected to read: what the policy of attention chooses, as if
        from all tiers alike. What is read in chunks is mostly the prompt, which attends to everything."""
        table = sequence.table
        if self._policy is None or sequence.is_prefilling or not table.pages:
            return 1.0
        return self._policy.num_chosen(len(table.pages), table.page_size) / len(table.pages)

    def _unpark(self, running: list[Sequence]) -> None:
        for sequence in running:
            if sequence.is_parked:
                sequence.is_parked = False
                self._cache.unpark(sequence.table.pages)
        self._any_parked = False
        self._members = []
