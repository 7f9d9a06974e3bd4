"""Which page lies where: the policy case by case, and a model in which no page may ever be read wrong."""

import random
from collections import Counter, deque
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv.errors import CapacityError
from distkv.storage.ledger.disk_journal import DiskChanges, DiskJournal
from distkv.storage.ledger.disk_refusals import WRITE_RETRY
from distkv.storage.ledger.page import Page, PageKey
from distkv.storage.ledger.page_table import PageTable
from distkv.storage.ledger.prefix_index import page_keys
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.ledger.write_back import MAX_DISK_WRITES
from distkv.storage.tier import Tier, Transfer, decode_location, encode_location

DEVICE, HOST, DISK = Tier
PAGE_SIZE = 2

Place = tuple[Tier, int]
Content = tuple[int, ...]
"""The tokens in a page; (-1, id) while transfer `id` fills it."""


class Ranks:
    """What ranks do with plans, over a dict of slot -> content. Copies between device and host run one after another;
    what goes to or comes from disk ends in any order. Nobody may touch what a transfer reads or fills.

    The disk has room for the files of `disk_room` pages, which may be less than slots. A slot keeps its files until it
    is written again.
    """

    def __init__(self, rng: random.Random, faults: float, disk_room: int) -> None:
        self.rng = rng
        self.faults = faults
        self.disk_room = disk_room
        self.files: set[int] = set()  # disk slots that have some
        self.speed = rng.choice([0.1, 0.5, 1])
        self.memory: dict[Place, Content] = {}
        self.damaged: set[int] = set()  # disk slots
        self.counts: Counter[str] = Counter()
        self._last_id = -1
        self._copies: deque[Transfer] = deque()  # the first one is under way
        self._disk: dict[int, Transfer] = {}
        self._read: dict[int, Content] = {}  # what the source held when the transfer began
        self._ended: dict[int, str | None] = {}  # id -> why it failed
        self._checksums: dict[int, Content] = {}

    @property
    def busy(self) -> bool:
        return bool(self._copies or self._disk or self._ended)

    def start(self, transfers: list[Transfer], await_ids: list[int]) -> None:
        """`Mover.start`: copies; waits for some; then what touches the disk."""
        new = [transfer for transfer in transfers if transfer.id > self._last_id]
        self._last_id = max([transfer.id for transfer in new], default=self._last_id)
        for transfer in new:
            if DISK not in (transfer.source, transfer.target):
                self._copies.append(transfer)
                if len(self._copies) == 1:
                    self._begin(transfer)
        while any(transfer.id in await_ids for transfer in self._copies):
            self._end_copy()
        for transfer in new:
            if DISK in (transfer.source, transfer.target):
                self._disk[transfer.id] = transfer
                self._begin(transfer)
        for id in await_ids:
            if id in self._disk:
                self._end(self._disk.pop(id))

    def go_on(self, chance: float) -> None:
        """Lets some of what is under way end."""
        chance *= self.speed
        while self._copies and self.rng.random() < chance:
            self._end_copy()
        for id in self.rng.sample(sorted(self._disk), len(self._disk)):
            if self.rng.random() < chance:
                self._end(self._disk.pop(id))

    def read(self, slot: int) -> bool:
        """Whether a step can read a page on disk."""
        return slot not in self.damaged and self.rng.random() >= self.faults / 10

    def report(self, must: Iterable[int]) -> tuple[list[int], list[tuple[int, str]], dict[int, Content]]:
        """Some of what has ended, `must` in any case: a transfer is reported once the last rank has ended it."""
        must = set(must)
        reported = [id for id in self._ended if id in must or self.rng.random() < 0.8]
        reasons = {id: self._ended.pop(id) for id in reported}
        failed = [(id, reason) for id, reason in reasons.items() if reason is not None]
        done = [id for id, reason in reasons.items() if reason is None]
        return done, failed, {id: self._checksums.pop(id) for id in done if id in self._checksums}

    def _begin(self, transfer: Transfer) -> None:
        self._read[transfer.id] = self.memory[transfer.source, transfer.source_slot]
        assert self._read[transfer.id][0] >= 0, f"{transfer} reads what is still being filled"
        if transfer.target is DISK:
            self.files.discard(transfer.target_slot)
        self.memory[transfer.target, transfer.target_slot] = -1, transfer.id

    def _end_copy(self) -> None:
        self._end(self._copies.popleft())
        if self._copies:
            self._begin(self._copies[0])

    def _end(self, transfer: Transfer) -> None:
        content = self.memory[transfer.source, transfer.source_slot]
        assert content == self._read.pop(transfer.id), f"the source of {transfer} changed"
        target = transfer.target, transfer.target_slot
        assert self.memory[target] == (-1, transfer.id), f"the target of {transfer} changed"
        route = f"{transfer.source.name}->{transfer.target.name}"
        if transfer.source is DISK and not self.read(transfer.source_slot):
            self._ended[transfer.id] = "bad block"
        elif transfer.target is DISK and (len(self.files) >= self.disk_room or self.rng.random() < self.faults):
            self._ended[transfer.id] = "no space"
        else:
            self.memory[target] = content
            self._ended[transfer.id] = None
            if transfer.target is DISK:
                self.files.add(transfer.target_slot)
                self.damaged.discard(transfer.target_slot)
                self._checksums[transfer.id] = content
            self.counts[route] += 1
            return
        self.counts[f"{route} failed"] += 1


class Simulation:
    """Does with a cache what the engine does, at random, and reads every page all the time."""

    def __init__(
        self,
        seed: int,
        num_pages: tuple[int, int, int],
        step_pages: int,
        faults: float,
        disk_room: int | None = None,  # pages; all slots unless given
    ) -> None:
        self.rng = random.Random(seed)
        self.num_pages = *num_pages[:2], num_pages[DISK] if disk_room is None else min(num_pages[DISK], disk_room)
        self.faults = faults
        self.caching = self.rng.random() < 0.7
        share = self.rng.choice([None, 0.2, 0.5])
        self.tenants = [b"a", b"b", b"c"] if share else [None]
        self.cache = TieredCache(num_pages, step_pages, write_through=self.rng.random() < 0.5, share=share)
        self.histories: list[tuple[bytes | None, list[int]]] = []  # of sequences that were there
        self.step_pages = step_pages
        self.ranks = Ranks(self.rng, faults, self.num_pages[DISK])
        self.counts = self.ranks.counts
        self.tokens: dict[PageTable, list[int]] = {}
        self.planned: dict[PageTable, list[int]] = {}  # tokens of which pages are known, from the first one on
        self.copies: list[tuple[Page, Page]] = []
        self.catalogue: dict[int, Content] = {}
        self.next_token = 0

    def run(self, steps: int) -> None:
        actions = [self.step, self.fork, self.release, self.idle, self.damage, self.begin, self.park, self.reset]
        for _ in range(steps):
            self.rng.choices(actions, [15, 3, 2, 5, 4 * (self.faults > 0), 3, 1, 0.1])[0]()
            self.check()

    def end(self) -> None:
        """Releases everything; all slots must be free once nothing moves and no key is known."""
        for table in list(self.tokens):
            self.drop(table)
        self.release_copies()
        assert self.cache.num_pages == 0
        self.idle()
        self.cache.reset()
        while awaited := self.cache.awaited:
            self.moving_plan(awaited)
        for _ in range(100):  # a copy that counts as ended may be reported some plans later
            self.moving_plan([])
            if not self.ranks.busy:
                break
        self.check()
        assert self.cache.num_pages == 0
        assert [slots.num_used for slots in self.cache.slots] == [0, 0, 0]
        assert not self.cache.lost and not self.catalogue

    # --- what happens ---

    def step(self) -> None:
        if self.cache.lost:
            self.repair()
            return
        if not self.tokens or self.rng.random() < 0.1:
            self.tokens[PageTable(self.cache, PAGE_SIZE, self.rng.choice(self.tenants))] = []
        chosen = self.schedule()
        needed: Counter[bytes] = Counter()
        for table, count in chosen:
            needed[table.tenant or b""] += table.missing(count)
        if not self.make_room(needed.total(), needed) or self.cache.lost:
            return
        writes: dict[Page, Content] = {}
        for table, count in chosen:
            tokens = self.tokens[table]
            table.append(count)
            tokens += self.planned.get(table, [])[len(tokens) : len(tokens) + count]
            missing = table.num_tokens - len(tokens)
            tokens += range(self.next_token, self.next_token + missing)
            self.next_token += missing
            writes |= {page: content for page, content in self.contents(table) if not page.full}
        self.move()
        readers = [table for table, _ in chosen]
        unread = self.plan([], writes, self.copies, readers, may_break=True)
        if unread is not None:
            self.release_copies()
        for table, count in chosen:
            if unread is None or not unread.isdisjoint(table.pages):
                table.rewind(count)
                del self.tokens[table][-count:]
            else:
                idle = {page.key.digest for page in self.cache.index if page.is_idle and page.key}
                table.commit(count, self.keys(table.tenant, self.tokens[table]) if self.caching else None)
                self.counts["replaced"] += sum(page.key is not None and page.key.digest in idle for page in table.pages)

    @staticmethod
    def keys(tenant: bytes | None, tokens: list[int]) -> list[PageKey]:
        return list(page_keys(tenant or b"root", tokens, PAGE_SIZE))

    def begin(self) -> None:
        """A new sequence that has a prefix in common with one that was there, or computes some of it again."""
        if not self.histories:
            return
        tenant, tokens = self.rng.choice(self.histories)
        found = self.cache.find(self.keys(tenant, tokens)[: self.rng.randint(1, 4)])
        if self.rng.random() < 0.3:
            self.cache.touch(found, tenant)
            self.cache.promote(found)
            return
        held = {page for page in found if page.references}
        if self.cache.num_pages + len(found) - len(held) > self.cache.capacity:
            return
        table = PageTable(self.cache, PAGE_SIZE, tenant)
        if self.rng.random() < 0.5:
            found = found[: self.rng.randint(0, len(found))]
            self.planned[table] = tokens
        table.begin(found)
        self.tokens[table] = tokens[: len(found) * PAGE_SIZE]
        self.counts["found"] += len(found)

    def park(self) -> None:
        for table in self.tokens:
            (self.cache.park if self.rng.random() < 0.5 else self.cache.unpark)(table.pages)

    def reset(self) -> None:
        self.cache.reset()
        assert self.cache.num_idle == 0
        assert not any(self.cache.find(self.keys(*history)) for history in self.histories)

    def move(self) -> None:
        self.cache.balance()
        if self.cache.has_cold:
            pages = [page for table in self.tokens for page in table.pages]
            self.cache.promote(self.rng.sample(pages, len(pages)))

    def schedule(self) -> list[tuple[PageTable, int]]:
        """Tables with the number of tokens that each is to take, so many as there is room for."""
        room = min(self.room(), self.step_pages)
        if self.rng.random() < 0.95:
            room = min(room, self.cache.capacity - self.cache.num_pages)
        chosen = []
        for table in self.rng.sample(list(self.tokens), len(self.tokens)):
            count = self.rng.randint(1, PAGE_SIZE * 3)
            missing = table.missing(count)
            if missing <= room:
                room -= missing
                chosen.append((table, count))
        return chosen

    def room(self) -> int:
        """Device slots that do not hold pages being filled."""
        unfilled = {page for table in self.tokens for page in table.pages if not page.full}
        unfilled |= {page for pair in self.copies for page in pair if not page.full}
        return self.cache.slots[DEVICE].num_slots - len(unfilled)

    def make_room(self, count: int, coming: Counter[bytes] | None = None) -> bool:
        """As the engine does; may be refused only when the pages do not fit indeed."""
        for _ in range(100):
            held = self.cache.num_pages - len(self.cache.lost)
            try:
                if self.cache.reserve(count, coming):
                    assert self.cache.slots[DEVICE].num_free >= count
                    return True
            except CapacityError as error:
                assert held + count > self.cache.capacity, error
                # idle pages never stand in the way, not on a full disk either
                assert held + count > sum(self.num_pages) or self.faults
                self.counts["refused, the disk is full"] += "no space" in str(error)
                self.counts["refused"] += 1
                if self.tokens:
                    self.drop(self.rng.choice(list(self.tokens)))
                return False
            assert self.cache.awaited, "waits for nothing"
            self.moving_plan(self.cache.awaited)
        raise AssertionError("reserve never ends")

    def fork(self) -> None:
        if not self.tokens or self.room() < 1 or self.cache.num_pages >= self.cache.capacity:
            return
        table = self.rng.choice(list(self.tokens))
        if not self.make_room(1) or table not in self.tokens:
            return
        other, copy = table.fork()
        self.tokens[other] = list(self.tokens[table])
        if copy is not None:
            for page in copy:
                self.cache.share(page)
            self.copies.append(copy)

    def release(self) -> None:
        for table in self.rng.sample(list(self.tokens), self.rng.randint(0, len(self.tokens))):
            self.drop(table)

    def drop(self, table: PageTable) -> None:
        self.histories = [*self.histories[-5:], (table.tenant, self.tokens[table])]
        table.release()
        assert table.pages == [] and table.num_tokens == 0
        del self.tokens[table]

    def release_copies(self) -> None:
        for pair in self.copies:
            for page in pair:
                self.cache.release(page)
        self.copies = []

    def idle(self) -> None:
        self.move()
        self.moving_plan(self.cache.awaited if self.rng.random() < 0.5 else [])

    def damage(self) -> None:
        if self.catalogue:
            self.ranks.damaged.add(self.rng.choice(sorted(self.catalogue)))

    def repair(self) -> None:
        page = min(self.cache.lost, key=lambda page: page.index)
        owner = next(table for table in self.tokens if page in table.pages)
        assert owner.pages[page.index] is page
        if self.room() < 1 or not self.make_room(1) or owner not in self.tokens:
            return
        content = dict(self.contents(owner))[page]
        self.cache.restore(page)
        before = page.repairs
        unread = self.plan([], {page: content}, [], [], may_break=True, repairing=page)
        if unread is None or self.rng.random() < 0.2:
            self.cache.forget(page)
            assert page.repairs == before and page.full
        else:
            self.cache.fill(page)
            self.counts["repaired"] += 1
            assert page.repairs == before + 1 and page.full

    def prepare_ahead(self) -> None:
        """What the engine decides for the next plan while this one still runs; the next one will take it along."""
        try:
            self.cache.reserve(self.rng.randint(0, min(self.step_pages, self.room())))
        except CapacityError:
            self.counts["refused ahead"] += 1
        self.move()

    # --- plans ---

    def moving_plan(self, await_ids: list[int]) -> None:
        self.plan(await_ids, {}, [], [])

    def plan(
        self,
        await_ids: list[int],
        writes: dict[Page, Content],
        copies: list[tuple[Page, Page]],
        readers: list[PageTable],
        may_break: bool = False,
        repairing: Page | None = None,
    ) -> set[Page] | None:
        """Has the ranks run a plan and takes in their report; None when it broke, which leaves open how far it came."""
        # the plan is prepared here, and nothing of the cache is looked at before it ends
        where = {page: place(page) for table in self.tokens for page in table.pages if page.full and not page.lost}
        truth = {page: content for table in self.tokens for page, content in self.contents(table) if page in where}
        to_come = {*writes, repairing, *(target for _, target in self.copies if not copies)}
        unfilled = {
            place(page): content for table in self.tokens for page, content in self.contents(table)
            if not page.full and page not in to_come
        }  # fmt: skip
        written = {place(page): content for page, content in writes.items()}
        pairs = [(place(source), place(target)) for source, target in copies]
        assert all(tier is DEVICE for tier, _ in [*written, *unfilled, *(one for pair in pairs for one in pair)])
        reads = sorted(
            {where[page][1] for table in readers for page in table.pages if where.get(page, (0,))[0] is DISK}
        )
        transfers, others = self.cache.take_transfers()
        await_ids = others + await_ids
        self.update_catalogue({})

        broken = self.rng.choice(["before", "started", "after"]) if may_break and self.rng.random() < 0.03 else ""
        if broken != "before":
            self.ranks.start(transfers, await_ids)
            self.check_catalogue()
            self.check_contents(where, truth)
        if broken in ("", "after"):
            self.ranks.go_on(self.rng.choice([0, 0.3]))
            for source, target in pairs:
                self.ranks.memory[target] = self.ranks.memory.get(source, ())
            self.ranks.memory |= written
            self.check_contents(where, truth)
            for one, content in unfilled.items():
                assert self.ranks.memory.get(one, ())[: len(content)] == content
            bad = [slot for slot in reads if not self.ranks.read(slot)]
            self.ranks.go_on(self.rng.choice([0, 0.2, 0.5, 1]))
            self.check_contents(where, truth)
        if broken:
            self.counts["broken"] += 1
            self.cache.put_back(transfers, await_ids)
            return None
        if self.rng.random() < 0.3 and not self.cache.lost and repairing is None:
            self.prepare_ahead()
        # a GPU waits for copies by itself, so that a step's report may not tell of them yet
        must = [] if readers or written else await_ids
        done, failed, checksums = self.ranks.report(must)
        lost_before = set(self.cache.lost)
        unread = self.cache.apply(done, failed, bad)
        assert unread == {page for page in where if where[page][0] is DISK and where[page][1] in bad}
        self.counts["lost"] += len(self.cache.lost.keys() - lost_before)
        self.update_catalogue(checksums)
        return unread

    def update_catalogue(self, checksums: dict[int, Content]) -> None:
        """As the engine does."""
        changes = self.cache.journal.take()
        for slot in changes.vacated:
            self.catalogue.pop(slot, None)
        self.catalogue |= {slot: checksums[id] for slot, (id, _) in changes.written.items()}
        assert changes.touched <= self.catalogue.keys() | changes.vacated
        self.check_catalogue()

    # --- what must hold ---

    def contents(self, table: PageTable) -> list[tuple[Page, Content]]:
        tokens = self.tokens[table]
        return [(page, tuple(tokens[n * PAGE_SIZE : (n + 1) * PAGE_SIZE])) for n, page in enumerate(table.pages)]

    def check(self) -> None:
        self.cache.integrity_check()
        held = {page for table in self.tokens for page in table.pages} | {page for pair in self.copies for page in pair}
        assert self.cache.num_pages == len(held)
        assert {page for page in held if page.full and page.lost} == set(self.cache.lost)
        for table, tokens in self.tokens.items():
            assert table.num_tokens == table.num_committed == len(tokens)
            assert [page.index for page in table.pages] == list(range(len(table.pages)))
            assert [page.full for page in table.pages[: len(tokens) // PAGE_SIZE]] == [True] * (
                len(tokens) // PAGE_SIZE
            )

    def check_contents(self, where: dict[Page, Place], truth: dict[Page, Content]) -> None:
        for page, one in where.items():
            assert self.ranks.memory[one] == truth[page], f"page {page.index} at {one}"

    def check_catalogue(self) -> None:
        """What is listed lies on disk whole, so a kill at any moment leaves the catalogue right."""
        for slot, content in self.catalogue.items():
            assert self.ranks.memory[DISK, slot] == content


def place(page: Page) -> Place:
    """Tier and slot of `page.location`."""
    return decode_location(page.location)


def sizes() -> st.SearchStrategy[tuple[int, int, int]]:
    """Small pools; without a host there is no disk."""
    return st.one_of(
        st.tuples(st.integers(3, 6), st.integers(1, 6), st.integers(0, 8)),
        st.tuples(st.integers(3, 6), st.just(0), st.just(0)),
    )


@settings(max_examples=8 * settings().max_examples)
@given(
    st.integers(0, 2**32),
    st.integers(1, 60),
    sizes(),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.05, 0.5]),
    st.integers(0, 8),
)
def test_every_page_is_read_right(
    seed: int, steps: int, num_pages: tuple[int, int, int], step_pages: int, faults: float, disk_room: int
) -> None:
    simulation = Simulation(seed, num_pages, step_pages, faults, disk_room)
    simulation.run(steps)
    simulation.end()


@pytest.mark.parametrize("num_pages", [(6, 6, 8), (4, 2, 4), (3, 1, 1), (5, 4, 0)], ids=str)
def test_long_runs_meet_everything(num_pages: tuple[int, int, int]) -> None:
    """Thousands of steps in one cache; and the simulation does what it is meant to do."""
    counts: Counter[str] = Counter()
    for seed, faults in enumerate([0, 0.05, *[0.5] * 2]):
        simulation = Simulation(seed, num_pages, 1, faults)
        simulation.run(1000)
        simulation.end()
        counts += simulation.counts
    simulation = Simulation(7, num_pages, 1, 0, disk_room=num_pages[DISK] // 2)
    simulation.run(2000)
    simulation.end()
    assert simulation.counts["refused, the disk is full"] or num_pages[DISK] < 2
    wanted = {"DEVICE->HOST", "refused", "broken", "found"} | ({"replaced"} if num_pages[HOST] > 1 else set())
    if num_pages[HOST] > 2:  # promoting takes more than two free slots
        wanted |= {"HOST->DEVICE"}
    if num_pages[DISK]:
        wanted |= {"HOST->DISK", "HOST->DISK failed", "lost", "repaired"}
        wanted |= {"DISK->HOST"} if num_pages[HOST] > 2 else set()
    assert wanted <= counts.keys()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_many_long_runs(seed: int) -> None:
    rng = random.Random(seed)
    for number in range(500):
        host = rng.randint(0, 6)
        num_pages = rng.randint(3, 6), host, rng.randint(0, 8) if host else 0
        simulation = Simulation(1000 * seed + number, num_pages, rng.randint(1, 3), rng.choice([0, 0.05, 0.5]))
        simulation.run(200)
        simulation.end()


# --- the policy, case by case ---


def fill_pages(cache: TieredCache, count: int, first: int = 0) -> list[Page]:
    """Full pages `first`, `first + 1`, ... on the device, for which there must be room."""
    pages: list[Page] = []
    for index in range(first, first + count):
        pages.append(cache.allocate(index, pages[-1] if pages else None))
        cache.fill(pages[-1])
    return pages


def take(cache: TieredCache) -> list[Transfer]:
    """Queued transfers of which none must be waited for."""
    transfers, wait = cache.take_transfers()
    assert not wait
    return transfers


def end(cache: TieredCache, transfers: Iterable[Transfer]) -> None:
    cache.apply([transfer.id for transfer in transfers], [], [])
    cache.integrity_check()


def spill(cache: TieredCache) -> list[Transfer]:
    """Balances until nothing moves any more; returns what moved."""
    moved: list[Transfer] = []
    while True:
        cache.balance()
        transfers = take(cache)
        end(cache, transfers)
        if not transfers:
            return moved
        moved += transfers


def routes(transfers: Iterable[Transfer]) -> list[tuple[Tier, Tier]]:
    return [(transfer.source, transfer.target) for transfer in transfers]


def on(tier: Tier, pages: Iterable[Page]) -> list[int]:
    """Indices of the pages that have a copy in a tier."""
    return [page.index for page in pages if page.has(tier)]


def test_full_pages_are_written_through_while_the_host_has_room() -> None:
    cache = TieredCache((4, 2, 0), 1)
    pages = fill_pages(cache, 3)
    unfilled = cache.allocate(3)
    cache.balance()
    transfers = take(cache)
    assert [(one.source, one.source_slot) for one in transfers] == [(DEVICE, 0), (DEVICE, 1)]
    assert {(one.target, one.target_slot) for one in transfers} == {(HOST, 0), (HOST, 1)}
    assert on(HOST, pages) == []
    end(cache, transfers)
    assert on(HOST, pages) == [0, 1] and on(DEVICE, pages) == [0, 1, 2]
    assert spill(cache) == []
    cache.release(pages[0])
    assert [one.source_slot for one in spill(cache)] == [pages[2].slots[DEVICE]]
    assert unfilled.slots[HOST] is None


def test_a_page_is_written_through_once() -> None:
    """One that was evicted before its turn came, and has come back since."""
    cache = TieredCache((3, 8, 0), 1)
    pages = fill_pages(cache, 3)
    assert cache.reserve(1)
    end(cache, cache.take_transfers()[0])
    cache.release(pages.pop())
    cache.release(pages.pop(0))
    cache.promote(pages)
    end(cache, take(cache))
    assert on(DEVICE, pages) == on(HOST, pages) == [1]
    assert spill(cache) == []


def test_a_page_whose_host_slot_went_to_another_is_written_through_again() -> None:
    cache = TieredCache((2, 1, 0), 1)
    pages = fill_pages(cache, 1)
    assert len(spill(cache)) == 1
    pages += fill_pages(cache, 1, 1)
    assert cache.reserve(1)
    end(cache, cache.take_transfers()[0])
    assert on(DEVICE, pages) == [0] and on(HOST, pages) == [1]
    cache.release(pages.pop())
    assert len(spill(cache)) == 1
    assert on(HOST, pages) == [0]


def test_a_page_with_a_copy_below_leaves_the_device_without_a_transfer() -> None:
    cache = TieredCache((3, 3, 0), 1)
    pages = fill_pages(cache, 3)
    spill(cache)
    assert cache.reserve(1)
    assert take(cache) == []
    assert on(DEVICE, pages) == [0, 2]
    assert pages[1].location == encode_location(HOST, 1)


def test_a_page_without_one_is_copied_and_the_next_plan_waits() -> None:
    cache = TieredCache((2, 2, 0), 1)
    pages = fill_pages(cache, 2)
    assert cache.reserve(1)
    [transfer], wait = cache.take_transfers()
    assert (transfer.source, transfer.source_slot, transfer.target) == (DEVICE, 1, HOST)
    assert wait == [transfer.id]
    assert pages[1].location == encode_location(HOST, transfer.target_slot)
    assert cache.allocate(2).location == 1
    end(cache, [transfer])
    assert on(DEVICE, pages) == [0] and on(HOST, pages) == [1]


def test_a_copy_under_way_is_waited_for_when_its_page_must_go() -> None:
    cache = TieredCache((2, 2, 0), 1)
    pages = fill_pages(cache, 2)
    cache.balance()
    first, second = take(cache)
    assert cache.reserve(1)
    assert cache.take_transfers() == ([], [second.id])
    assert on(DEVICE, pages) == [0] and on(HOST, pages) == [1]
    end(cache, [first, second])
    assert on(HOST, pages) == [0, 1]


def test_the_first_page_stays_and_the_oldest_goes() -> None:
    cache = TieredCache((4, 16, 0), 1)
    pages: list[Page] = []
    for index in range(9):
        assert cache.reserve(1)
        pages += fill_pages(cache, 1, index)
        spill(cache)
    assert on(DEVICE, pages) == [0, 6, 7, 8]
    firsts = [pages[0]]
    for _ in range(3):
        assert cache.reserve(1)
        firsts += fill_pages(cache, 1)
    assert [page.has(DEVICE) for page in firsts] == [True] * 4
    assert cache.reserve(1)  # nothing but first pages is left
    assert [page.has(DEVICE) for page in firsts] == [False, True, True, True]


def test_pages_that_are_being_filled_stay() -> None:
    cache = TieredCache((2, 4, 0), 1)
    for index in range(2):
        cache.allocate(index)
    with pytest.raises(CapacityError, match=r"1 device pages are needed in a step, 0 of 2 are free.*device_kv_bytes"):
        cache.reserve(1)


def test_a_nearly_full_host_writes_its_oldest_to_disk_ahead_of_need() -> None:
    cache = TieredCache((8, 8, 8), 2)
    pages = fill_pages(cache, 6)
    cache.balance()
    end(cache, take(cache))
    assert routes(spill(cache)) == []  # two slots are free, a step's pages
    pages += fill_pages(cache, 1, 6)
    cache.balance()
    transfers = take(cache)
    assert routes(transfers) == [(DEVICE, HOST)] + [(HOST, DISK)] * MAX_DISK_WRITES
    written = [one.source_slot for one in transfers[1:]]
    assert written == [page.slots[HOST] for page in pages[:MAX_DISK_WRITES]]
    end(cache, transfers[:-2])
    cache.balance()
    # two pages are on disk, and their host slots free; twice a step's pages shall be
    assert on(DISK, pages) == [0, 1] and on(HOST, pages) == [2, 3, 4, 5, 6]
    end(cache, transfers[-2:])
    assert on(HOST, pages) == [2, 3, 4, 5, 6]
    cache.balance()
    assert on(DISK, pages) == [0, 1, 2, 3] and on(HOST, pages) == [3, 4, 5, 6]
    assert routes(take(cache)) == []


def test_the_host_gives_a_page_up_only_when_the_disk_has_it() -> None:
    cache = TieredCache((2, 1, 2), 1)
    pages = fill_pages(cache, 2)
    assert cache.reserve(1)
    pages += fill_pages(cache, 1, 2)
    transfers, _ = cache.take_transfers()
    end(cache, transfers)
    assert not cache.reserve(1)
    [write] = take(cache)
    assert (write.source, write.target) == (HOST, DISK) and cache.awaited == [write.id]
    assert not cache.reserve(1) and not cache.take_transfers()[0]
    assert pages[1].location == encode_location(HOST, 0)
    end(cache, [write])
    assert cache.reserve(1)
    assert pages[1].location == encode_location(DISK, write.target_slot)
    assert on(HOST, pages) == [2] and on(DEVICE, pages) == [0]


def test_promote_brings_pages_up_while_twice_a_steps_room_is_free() -> None:
    cache = TieredCache((5, 16, 0), 1)
    pages: list[Page] = []
    for index in range(9):
        assert cache.reserve(1)
        pages += fill_pages(cache, 1, index)
        spill(cache)
    cold = [page for page in pages if not page.has(DEVICE)]
    cache.promote(cold)
    assert take(cache) == []
    for page in pages:
        if page not in cold:
            cache.release(page)
    wanted = [cold[2], cold[0], cold[3], cold[1]]
    cache.promote(wanted)
    transfers = take(cache)
    assert routes(transfers) == [(HOST, DEVICE)] * 3
    assert [one.source_slot for one in transfers] == [page.slots[HOST] for page in wanted[:3]]
    assert all(page.location < 0 for page in wanted)
    end(cache, transfers)
    assert [page.location for page in wanted[:3]] == [one.target_slot for one in transfers]
    assert wanted[3].location < 0 and cache.slots[DEVICE].num_free == 2
    assert on(HOST, wanted) == [page.index for page in wanted]  # their next eviction is a drop again


def test_promote_takes_pages_from_disk_to_the_host_first() -> None:
    cache, page = page_on_disk((8, 8, 8))
    cache.promote([page])
    [transfer] = take(cache)
    assert (transfer.source, transfer.target) == (DISK, HOST)
    assert page.location == encode_location(DISK, transfer.source_slot)
    cache.promote([page])
    assert take(cache) == []
    end(cache, [transfer])
    assert page.location == encode_location(HOST, transfer.target_slot)
    cache.promote([page])
    [transfer] = take(cache)
    assert (transfer.source, transfer.target) == (HOST, DEVICE)
    end(cache, [transfer])
    assert page.location == transfer.target_slot


def test_promote_leaves_the_host_the_room_of_two_steps() -> None:
    cache, page = page_on_disk((8, 3, 8))
    pages = fill_pages(cache, 1)
    cache.balance()
    end(cache, take(cache))
    cache.promote([page])
    assert take(cache) == []
    cache.release(pages[0])
    cache.promote([page])
    assert routes(take(cache)) == [(DISK, HOST)]


def page_on_disk(num_pages: tuple[int, int, int]) -> tuple[TieredCache, Page]:
    """A cache that holds one page, on disk alone."""
    cache = TieredCache(num_pages, 1)
    pages: list[Page] = []
    while not any(page.has(DISK) and not page.has(HOST) and not page.has(DEVICE) for page in pages):
        while not cache.reserve(1):
            end(cache, cache.take_transfers()[0])
        pages += fill_pages(cache, 1, len(pages))
        cache.balance()
        end(cache, cache.take_transfers()[0])
    cold = next(page for page in pages if page.location <= encode_location(DISK, 0))
    for page in pages:
        if page is not cold:
            cache.release(page)
    assert [slots.num_used for slots in cache.slots] == [0, 0, 1]
    return cache, cold


def refuse_writes(cache: TieredCache, transfers: Iterable[Transfer]) -> None:
    """Ends transfers; the disk takes none of its pages."""
    transfers = list(transfers)
    cache.apply(
        [one.id for one in transfers if one.target is not DISK],
        [(one.id, "the disk is full") for one in transfers if one.target is DISK],
        [],
    )
    cache.integrity_check()


def test_a_disk_that_takes_no_more_keeps_pages_on_the_host() -> None:
    cache = TieredCache((2, 2, 4), 1)
    pages = fill_pages(cache, 2)
    cache.balance()
    end(cache, take(cache))
    cache.balance()
    transfers = take(cache)
    assert routes(transfers) == [(HOST, DISK)] * 2 and cache.capacity == 8
    refuse_writes(cache, transfers)
    assert cache.capacity == 4 and "the disk is full" in cache.disk_refusal
    for index in (2, 3):
        assert cache.reserve(1)
        pages += fill_pages(cache, 1, index)
        end(cache, cache.take_transfers()[0])
    assert on(DEVICE, pages) == [0, 3] and on(HOST, pages) == [1, 2]
    full = r"hold \[2, 2, 0\] KV pages of \[2, 2, 4\].*\(the disk refuses more: the disk is full\); raise host_kv_bytes"
    with pytest.raises(CapacityError, match=full):
        cache.reserve(1)
    for _ in range(WRITE_RETRY - 1):
        cache.balance()
        assert take(cache) == []
    cache.balance()  # it is tried again
    assert routes(take(cache)) == [(HOST, DISK)] * 2
    assert cache.capacity == 8


def test_a_disk_with_room_again_is_tried_at_once() -> None:
    cache = TieredCache((2, 1, 4), 1)
    pages: list[Page] = []
    for index in range(4):
        while not cache.reserve(1):
            end(cache, cache.take_transfers()[0])
        pages += fill_pages(cache, 1, index)
    transfers, _ = cache.take_transfers()
    end(cache, transfers)
    assert on(DISK, pages) == [1]
    assert not cache.reserve(1)
    refuse_writes(cache, take(cache))
    assert cache.capacity == 2 + 1 + 1
    with pytest.raises(CapacityError, match="the disk is full"):
        cache.reserve(1)
    cache.release(pages[1])
    assert cache.capacity == 2 + 1 + 1, "in the room of the one that has left"
    assert not cache.reserve(1)
    assert routes(take(cache)) == [(HOST, DISK)]


def test_a_page_on_disk_leaves_the_device_when_the_disk_refuses_another() -> None:
    """The page whose turn it is has nowhere to go; the room that another one's copy makes is used."""
    cache, cold = page_on_disk((8, 3, 8))
    pages = fill_pages(cache, 5)
    for _ in range(2):
        cache.promote([cold])
        end(cache, take(cache))
    pages += fill_pages(cache, 2, 5)
    for index in range(7, 11):
        while not cache.reserve(1):
            refuse_writes(cache, cache.take_transfers()[0])
        assert cold.has(DEVICE) == (index < 10)
        pages += fill_pages(cache, 1, index)
        end(cache, cache.take_transfers()[0])
    assert cache.capacity == cache.num_pages == 12
    assert on(DISK, [cold, *pages]) == [cold.index]
    with pytest.raises(CapacityError, match="the disk is full"):
        cache.reserve(1)


def test_a_page_that_cannot_be_read_back_is_lost_until_it_is_filled_again() -> None:
    cache, page = page_on_disk((4, 4, 4))
    [slot] = [page.slots[DISK]]
    assert slot is not None
    assert cache.apply([], [], [slot]) == {page}
    assert page.lost and list(cache.lost) == [page]
    assert cache.slots[DISK].num_used == 0
    cache.integrity_check()
    cache.restore(page)
    cache.forget(page)
    assert list(cache.lost) == [page]
    cache.integrity_check()
    cache.restore(page)
    cache.fill(page)
    assert not page.lost and not cache.lost and page.repairs == 1
    cache.integrity_check()
    cache.balance()
    assert routes(take(cache)) == [(DEVICE, HOST)]


def test_a_page_whose_way_up_fails_is_lost() -> None:
    cache, page = page_on_disk((4, 4, 4))
    cache.promote([page])
    [transfer] = take(cache)
    assert cache.apply([], [(transfer.id, "bad block")], []) == set()
    assert list(cache.lost) == [page]
    assert [slots.num_used for slots in cache.slots] == [0, 0, 0]
    cache.release(page)
    assert not cache.lost
    cache.integrity_check()


def test_a_page_that_nobody_holds_is_no_loss() -> None:
    cache, page = page_on_disk((4, 4, 4))
    cache.promote([page])
    [transfer] = take(cache)
    cache.release(page)
    cache.apply([], [(transfer.id, "bad block")], [])
    assert not cache.lost
    assert [slots.num_used for slots in cache.slots] == [0, 0, 0]


def test_a_bad_copy_on_disk_is_no_loss_while_there_is_another() -> None:
    cache, page = page_on_disk((4, 4, 4))
    slot = page.slots[DISK]
    assert slot is not None
    cache.promote([page])
    [transfer] = take(cache)
    assert cache.apply([transfer.id], [], [slot]) == {page}  # the step could not read it, the transfer could
    assert not cache.lost and page.location == encode_location(HOST, transfer.target_slot)
    assert cache.slots[DISK].num_used == 0


def test_slots_of_a_released_page_are_free_once_no_transfer_touches_them() -> None:
    cache = TieredCache((2, 2, 0), 1)
    pages = fill_pages(cache, 2)
    cache.balance()
    first, second = take(cache)
    cache.release(pages[0])
    assert cache.num_pages == 1
    assert [slots.num_used for slots in cache.slots] == [2, 2, 0]
    end(cache, [first])
    assert [slots.num_used for slots in cache.slots] == [1, 1, 0]
    cache.release(pages[1])
    end(cache, [second])
    assert [slots.num_used for slots in cache.slots] == [0, 0, 0]


def test_a_shared_page_is_held_until_its_last_holder_lets_go() -> None:
    cache = TieredCache((2, 0, 0), 1)
    [page] = fill_pages(cache, 1)
    cache.share(page)
    cache.release(page)
    assert page.location == 0 and cache.num_pages == 1
    cache.release(page)
    assert cache.num_pages == 0 and cache.slots[DEVICE].num_free == 2


def test_what_a_broken_plan_was_to_do_is_taken_again_in_order() -> None:
    cache = TieredCache((2, 3, 0), 1)
    pages = fill_pages(cache, 2)
    assert cache.reserve(1)
    taken = cache.take_transfers()
    cache.put_back(*taken)
    pages += fill_pages(cache, 1, 2)
    cache.balance()
    transfers, wait = cache.take_transfers()
    assert [one.id for one in transfers] == [0, 1, 2] and wait == taken[1] == [0]


def keyed_pages(cache: TieredCache, tokens: list[int]) -> list[Page]:
    """A sequence of full pages that may be found."""
    pages = []
    for index, key in enumerate(page_keys(b"root", tokens, PAGE_SIZE)):
        pages.append(cache.allocate(index, pages[-1] if pages else None))
        cache.fill(pages[-1], key)
    return pages


def release(cache: TieredCache, pages: list[Page]) -> None:
    """As `PageTable.release` does."""
    for page in reversed(pages):
        cache.release(page)
    cache.integrity_check()


def found(cache: TieredCache, tokens: list[int]) -> list[Page]:
    return cache.find(page_keys(b"root", tokens, PAGE_SIZE))


def test_an_idle_page_that_is_computed_again_gives_its_place_to_the_new_one() -> None:
    cache, tokens = TieredCache((4, 4, 4), 1, write_through=True), [5, 6, 7, 8, 9, 9]
    old = keyed_pages(cache, tokens)
    spill(cache)
    release(cache, old)
    for tier in (DEVICE, HOST):  # so that the first two lie on disk alone, as after a restart
        for page in old[:2]:
            cache._ledger.drop(page, tier)
    slots, journal = [page.slots[DISK] for page in old[:2]], cache.journal.take()
    assert not journal.vacated
    table = PageTable(cache, PAGE_SIZE)
    table.append(4)
    table.commit(4, list(page_keys(b"root", tokens, PAGE_SIZE)))
    assert found(cache, tokens) == [*table.pages, old[2]], "and what follows is found still"
    assert [page.slots[DISK] for page in table.pages] == slots and not cache.journal.take(), "nothing is written again"
    assert routes(spill(cache)) == [(DEVICE, HOST)] * 2, "but the device's copy may go, as if the page had been brought"
    new = table.pages
    table.release()
    cache.integrity_check()
    assert found(cache, tokens) == [*new, old[2]] and cache.num_idle == 3


def test_the_journal_says_what_came_and_went() -> None:
    cache = TieredCache((4, 4, 4), 1, write_through=True)
    [page] = keyed_pages(cache, [5, 6])
    moved = spill(cache)
    assert routes(moved) == [(DEVICE, HOST), (HOST, DISK)]
    slot = page.slots[DISK]
    assert cache.journal.changes.written == {slot: (moved[-1].id, page)} and not cache.journal.changes.vacated
    cache.journal.take()
    release(cache, [page])
    assert cache.journal.changes.touched == {slot} and not cache.journal.changes.vacated
    cache.reset()
    assert cache.journal.changes.vacated == {slot} and not cache.journal.changes.touched and not found(cache, [5, 6])
    assert [slots.num_used for slots in cache.slots] == [0, 0, 0]


def test_a_journal_gives_what_it_has_once() -> None:
    """A slot that was vacated holds nothing new and nothing that was used."""
    journal = DiskJournal()
    assert not journal.take()
    page = Page(0)
    for slot in (1, 2, 3):
        journal.write(slot, 10 + slot, page)
        journal.touch(slot)
    journal.vacate(2)
    assert journal.take() == DiskChanges({2}, {1: (11, page), 3: (13, page)}, {1, 3})
    assert not journal.take() and not journal.changes


def test_a_reset_takes_held_pages_out_of_the_catalogue_at_once() -> None:
    """A kill before they are let go must not leave them for the next process."""
    cache = TieredCache((4, 4, 4), 1, write_through=True)
    pages = keyed_pages(cache, [5, 6, 7, 8])
    spill(cache)
    cache.journal.take()
    cache.reset()
    assert cache.journal.changes.vacated == {page.slots[DISK] for page in pages} and not cache.index
    assert on(DISK, pages) == [0, 1], "who holds them reads them still"
    release(cache, pages)
    assert cache.num_idle == 0 and [slots.num_used for slots in cache.slots] == [0, 0, 0]


def test_idle_pages_give_way_before_held_ones() -> None:
    """The least recently used and the end of a prefix first, into free room below before it is forgotten."""
    cache = TieredCache((6, 2, 0), 1)
    first, second = keyed_pages(cache, [1, 1, 2, 2]), keyed_pages(cache, [3, 3, 4, 4])
    release(cache, first)
    release(cache, second)
    held = fill_pages(cache, 2)
    assert cache.capacity == 8 and cache.num_pages == 2 and cache.num_idle == 4
    idle = []
    for _ in range(6):
        assert cache.reserve(1)
        cache.allocate(0)
        end(cache, cache.take_transfers()[0])
        idle.append(cache.num_idle)
    assert idle == [4, 4, 3, 2, 1, 0], "two find room on the host, and then each new page costs one"
    assert on(DEVICE, held) + on(HOST, held) and cache.num_pages == 8
    assert not found(cache, [1, 1, 2, 2]) and not found(cache, [3, 3, 4, 4])


def test_an_idle_page_is_taken_up_from_any_tier_and_counts_as_used() -> None:
    cache = TieredCache((8, 8, 8), 1, write_through=True)
    pages = keyed_pages(cache, [1, 1, 2, 2, 3, 3])
    spill(cache)
    release(cache, pages)
    assert on(DEVICE, pages) == on(HOST, pages) == on(DISK, pages) == [0, 1, 2] and cache.num_idle == 3
    table = PageTable(cache, PAGE_SIZE)
    table.begin(found(cache, [1, 1, 2, 2, 9, 9]))
    assert table.pages == pages[:2] and table.num_tokens == 4
    cache.integrity_check()
    assert (cache.num_pages, cache.num_idle) == (2, 1)
    cache.journal.take()
    table.release()
    assert cache.journal.changes.touched == {page.slots[DISK] for page in pages[:2]}
    assert (cache.num_pages, cache.num_idle) == (0, 3)
    cache.integrity_check()


def test_a_full_disk_gives_up_its_oldest_prefix_for_a_younger_one() -> None:
    cache = TieredCache((8, 8, 2), 1)
    prefixes = [[1, 1, 2, 2], [3, 3, 4, 4], [5, 5, 6, 6]]
    for tokens in prefixes:
        release(cache, keyed_pages(cache, tokens))
        spill(cache)
    on_disk = [len([page for page in found(cache, tokens) if page.has(DISK)]) for tokens in prefixes]
    assert on_disk == [0, 0, 2]
    assert [len(found(cache, tokens)) for tokens in prefixes] == [2, 2, 2], "the others lie further up"


def test_a_page_whose_copy_on_disk_went_is_saved_again() -> None:
    """That of a held page which lies further up goes for another page, or cannot be read; later there is room."""
    cache = TieredCache((4, 2, 2), 1, write_through=True)
    saved = keyed_pages(cache, [1, 1, 2, 2])
    spill(cache)
    assert on(DISK, saved) == [0, 1]
    others: list[Page] = []
    while saved[0].has(DISK):
        while not cache.reserve(1):
            end(cache, cache.take_transfers()[0])
        others += fill_pages(cache, 1, 1 + len(others))
        end(cache, cache.take_transfers()[0])
    assert saved[0].has(DEVICE) and not saved[0].has(HOST)
    release(cache, others)
    spill(cache)
    assert on(DISK, saved) == [0, 1] and saved[0].has(HOST)
    for _ in range(2):
        slot = saved[0].slots[DISK]
        assert slot is not None
        cache.apply([], [], [slot])
        assert on(DISK, saved) == [1]
        spill(cache)
        assert on(DISK, saved) == [0, 1]


def test_pages_that_the_disk_refuses_are_saved_when_it_takes_more() -> None:
    cache = TieredCache((8, 8, 8), 1)
    pages = keyed_pages(cache, [1, 1, 2, 2, 3, 3])
    release(cache, pages)
    cache.balance()
    end(cache, take(cache))
    cache.balance()
    refuse_writes(cache, take(cache))
    assert spill(cache) == [] and on(DISK, pages) == []
    cache.retry_disk()
    spill(cache)
    assert on(DISK, pages) == [0, 1, 2]


def test_touching_what_waits_for_a_request_keeps_it() -> None:
    cache = TieredCache((4, 0, 0), 1)
    release(cache, keyed_pages(cache, [1, 1, 2, 2]))
    release(cache, keyed_pages(cache, [3, 3, 4, 4]))
    cache.touch(found(cache, [1, 1, 2, 2]))
    assert cache.reserve(2)
    assert len(found(cache, [1, 1, 2, 2])) == 2 and not found(cache, [3, 3, 4, 4])
    cache.integrity_check()


def test_the_journal_says_so_before_a_slot_of_an_idle_page_is_written_again() -> None:
    cache = TieredCache((8, 8, 1), 1)
    [first] = keyed_pages(cache, [1, 1])
    release(cache, [first])
    spill(cache)
    slot = first.slots[DISK]
    cache.journal.take()
    release(cache, keyed_pages(cache, [2, 2]))
    cache.balance()
    end(cache, take(cache))
    cache.balance()
    assert cache.journal.changes.vacated == {slot}, "in the plan that writes it"
    [write] = take(cache)
    assert (write.target, write.target_slot) == (DISK, slot) and not cache.journal.changes.written
    end(cache, [write])
    assert list(cache.journal.changes.written) == [slot]


def test_a_keyless_copy_of_what_is_known_is_free_when_it_is_let_go() -> None:
    cache = TieredCache((4, 0, 0), 1)
    pages = keyed_pages(cache, [1, 1]) + keyed_pages(cache, [1, 1])
    assert [page.key is None for page in pages] == [False, True]
    release(cache, pages)
    assert cache.num_idle == 1 and cache.slots[DEVICE].num_free == 3
    assert found(cache, [1, 1]) == pages[:1]


def test_integrity_check_notices_a_slot_that_nobody_holds() -> None:
    cache = TieredCache((2, 2, 0), 1)
    fill_pages(cache, 1)
    cache.integrity_check()
    cache.slots[HOST].allocate(1)
    with pytest.raises(AssertionError):
        cache.integrity_check()
