"""Pages: their shapes, who holds them, and that no sequence ever sees another's tokens."""

from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from distkv.errors import CapacityError, ConfigError
from distkv.storage.device import CpuDevice
from distkv.storage.dtypes import DTYPES, torch_dtype
from distkv.storage.ledger.page_table import PageTable
from distkv.storage.ledger.slot_allocator import SlotAllocator
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import MIN_PAGE_SIZE
from distkv.storage.pools.device_pool import DevicePool
from distkv.storage.tier import Tier, decode_location, encode_location

PAGE_SIZE = 16
NUM_PAGES = 13


def check_neighbours(taken: list[int], free: set[int], after: int | None) -> None:
    """A free run behind `after` is used first; else one run where there is one that is long enough, the lowest."""
    run: list[int] = []
    if after is not None:
        while len(run) < len(taken) and after + 1 + len(run) in free:
            run.append(after + 1 + len(run))
    if run:
        assert taken[: len(run)] == run
        return
    fits = [first for first in free if all(first + i in free for i in range(len(taken)))]
    if fits:
        assert taken == list(range(min(fits), min(fits) + len(taken)))


class AllocatorMachine(RuleBasedStateMachine):
    """SlotAllocator against a set of taken slots."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = SlotAllocator(NUM_PAGES)
        self.taken: set[int] = set()

    @rule(
        count=st.one_of(st.integers(0, 3), st.integers(0, NUM_PAGES + 2)),
        after=st.one_of(st.none(), st.integers(0, NUM_PAGES - 1)),
    )
    def allocate(self, count: int, after: int | None) -> None:
        free = set(range(NUM_PAGES)) - self.taken
        if count > len(free):
            with pytest.raises(CapacityError, match=f"{count} KV pages.* {len(free)} of {NUM_PAGES} are free"):
                self.allocator.allocate(count, after)
            return
        slots = self.allocator.allocate(count, after)
        assert len(set(slots)) == len(slots) == count
        assert set(slots) <= free
        if count:
            check_neighbours(slots, free, after)
        self.taken.update(slots)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.taken)))
        self.allocator.free(slot)
        self.taken.remove(slot)

    @rule(slot=st.integers(-2, NUM_PAGES + 1))
    def take(self, slot: int) -> None:
        if slot in self.taken or not 0 <= slot < NUM_PAGES:
            with pytest.raises(ValueError, match=f"slot {slot} is not free"):
                self.allocator.take(slot)
            return
        self.allocator.take(slot)
        self.taken.add(slot)

    @rule(slot=st.integers(-2, NUM_PAGES + 1))
    def misuse(self, slot: int) -> None:
        if slot not in self.taken:
            with pytest.raises(ValueError, match=f"slot {slot} is not taken"):
                self.allocator.free(slot)

    @invariant()
    def agrees(self) -> None:
        self.allocator.integrity_check(self.taken)
        assert self.allocator.num_used == len(self.taken)
        assert self.allocator.num_free == NUM_PAGES - len(self.taken)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=3 * settings().max_examples)


class TableMachine(RuleBasedStateMachine):
    """Page tables over the device alone against plain lists of tokens; every token has a number of its own, and the
    pool is a dict of (slot, offset) -> token."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.cache = device_cache(NUM_PAGES)
        self.pool: dict[tuple[int, int], int] = {}
        self.tokens: dict[PageTable, list[int]] = {}
        self.next_token = 0

    @property
    def num_free(self) -> int:
        return self.cache.slots[Tier.DEVICE].num_free

    def state(self) -> list[object]:
        """All that a refused operation must leave alone."""
        pages = {page: page.references for table in self.tokens for page in table.pages}
        return [pages, self.num_free, [(list(table.pages), table.num_tokens) for table in self.tokens]]

    @rule(target=tables)
    def new(self) -> PageTable:
        table = PageTable(self.cache, PAGE_SIZE)
        self.tokens[table] = []
        return table

    @rule(
        table=tables,
        count=st.one_of(st.integers(0, 3), st.integers(0, 5 * PAGE_SIZE)),
        fails=st.sampled_from([False, False, True]),
    )
    def step(self, table: PageTable, count: int, fails: bool) -> None:
        """Appends tokens and writes them; a step that fails is taken back with its pages."""
        tokens = self.tokens[table]
        pages_before = list(table.pages)
        needed = max(0, -(-(len(tokens) + count) // PAGE_SIZE) - len(table.pages))
        assert table.missing(count) == needed
        if needed > self.num_free:
            before = self.state()
            with pytest.raises(CapacityError):
                self.cache.reserve(needed)
            assert self.state() == before
            return
        assert self.cache.reserve(needed)
        fresh = table.append(count)
        assert len(table.pages) == len(pages_before) + needed and table.pages[: len(pages_before)] == pages_before
        assert table.pages[len(pages_before) :] == fresh
        new = range(self.next_token, self.next_token + count)
        self.next_token += count
        for at, token in enumerate(new, start=len(tokens)):
            self.pool[table.pages[at // PAGE_SIZE].location, at % PAGE_SIZE] = token
        if fails:
            table.rewind(count)
            assert table.pages == pages_before
        else:
            table.commit(count)
            tokens += new

    @rule(target=tables, table=tables)
    def fork(self, table: PageTable):
        full = len(self.tokens[table]) // PAGE_SIZE
        wants_copy = len(table.pages) > full
        if wants_copy and not self.num_free:
            before = self.state()
            with pytest.raises(CapacityError):
                table.fork()
            assert self.state() == before
            return multiple()
        free = self.num_free
        other, copy = table.fork()
        assert other.pages[:full] == table.pages[:full]
        assert (copy is not None) == wants_copy == free - self.num_free
        if copy is not None:
            source, target = (page.location for page in copy)
            self.pool |= {(target, offset): self.pool.get((source, offset), -1) for offset in range(PAGE_SIZE)}
        self.tokens[other] = list(self.tokens[table])
        return other

    @rule(table=consumes(tables))
    def release(self, table: PageTable) -> None:
        table.release()
        assert table.pages == [] and table.num_tokens == 0
        del self.tokens[table]

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for table, tokens in self.tokens.items():
            assert table.num_tokens == len(tokens)
            assert len(table.pages) - table.num_committed // PAGE_SIZE == sum(not page.full for page in table.pages)
            assert [page.index for page in table.pages] == list(range(len(table.pages)))
            read = [self.pool[table.pages[at // PAGE_SIZE].location, at % PAGE_SIZE] for at in range(len(tokens))]
            assert read == tokens

    @invariant()
    def references_are_the_tables(self) -> None:
        self.cache.integrity_check()
        held = Counter(page for table in self.tokens for page in table.pages)
        assert {page: page.references for page in held} == held
        assert self.cache.num_pages == NUM_PAGES - self.num_free == len(held)


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=3 * settings().max_examples)


@settings(max_examples=8 * settings().max_examples)
@given(
    free=st.sets(st.integers(0, NUM_PAGES - 1), min_size=1),
    count=st.integers(1, NUM_PAGES),
    after=st.one_of(st.none(), st.integers(0, NUM_PAGES - 1)),
)
def test_allocate_from_any_free_slots(free: set[int], count: int, after: int | None) -> None:
    allocator = allocator_with(free)
    count = min(count, len(free))
    taken = allocator.allocate(count, after)
    assert len(set(taken)) == count and set(taken) <= free
    check_neighbours(taken, free, after)
    allocator.integrity_check(set(range(NUM_PAGES)) - free | set(taken))


def test_fresh_pool_hands_out_one_run() -> None:
    assert SlotAllocator(9).allocate(7) == list(range(7))


def test_a_growing_sequence_stays_one_run() -> None:
    """The page behind the last one is taken though a lower one is free."""
    cache = device_cache(8)
    first, table = PageTable(cache, PAGE_SIZE), PageTable(cache, PAGE_SIZE)
    first.append(2 * PAGE_SIZE)
    for _ in range(3):
        table.append(PAGE_SIZE)
        if first.pages:
            first.release()
    assert locations(table) == [2, 3, 4]


def test_refused_operations_change_nothing() -> None:
    cache = device_cache(3)
    table = PageTable(cache, PAGE_SIZE)
    table.append(2 * PAGE_SIZE + 1)
    table.commit(2 * PAGE_SIZE + 1)
    for refused in (table.fork, lambda: table.append(PAGE_SIZE)):
        with pytest.raises(CapacityError, match="1 KV pages are needed and 0 of 3 are free"):
            refused()
        with pytest.raises(CapacityError, match="raise host_kv_bytes or disk_kv_bytes"):
            cache.reserve(1)
        assert (locations(table), table.num_tokens) == ([0, 1, 2], 2 * PAGE_SIZE + 1)
        assert [page.references for page in table.pages] == [1, 1, 1]
        cache.integrity_check()


def test_a_second_step_is_settled_before_the_first_has_ended() -> None:
    cache = device_cache(4)
    table = PageTable(cache, PAGE_SIZE)
    table.append(PAGE_SIZE + 1)
    assert table.append(2 * PAGE_SIZE) == table.pages[2:]
    assert (table.num_tokens, table.num_committed, len(table.pages)) == (3 * PAGE_SIZE + 1, 0, 4)
    table.commit(PAGE_SIZE + 1)
    assert [page.full for page in table.pages] == [True, False, False, False]
    table.rewind(2 * PAGE_SIZE)
    assert (table.num_tokens, len(table.pages), cache.slots[Tier.DEVICE].num_free) == (PAGE_SIZE + 1, 2, 2)
    table.append(PAGE_SIZE - 1)
    table.commit(PAGE_SIZE - 1)
    assert all(page.full for page in table.pages)
    cache.integrity_check()


def test_the_longest_runs_are_taken_when_none_is_long_enough() -> None:
    assert allocator_with({0, 2, 3, 5, 6, 7}).allocate(5) == [5, 6, 7, 2, 3]


def test_integrity_check_notices() -> None:
    allocator = SlotAllocator(4)
    allocator.allocate(2)
    for wrong in (set(), {0}, {0, 2}, {0, 1, 2}):
        with pytest.raises(AssertionError):
            allocator.integrity_check(wrong)
    allocator.integrity_check({0, 1})


def device_cache(num_pages: int) -> TieredCache:
    """A cache of the device alone."""
    return TieredCache((num_pages, 0, 0), num_pages)


def allocator_with(free: set[int]) -> SlotAllocator:
    """An allocator of NUM_PAGES slots in which just these are free."""
    allocator = SlotAllocator(NUM_PAGES)
    for slot in allocator.allocate(NUM_PAGES):
        if slot in free:
            allocator.free(slot)
    return allocator


def locations(table: PageTable) -> list[int]:
    return [page.location for page in table.pages]


@given(tier=st.sampled_from(Tier), slot=st.integers(0, 2**39))
def test_a_location_is_an_integer(tier: Tier, slot: int) -> None:
    location = encode_location(tier, slot)
    assert decode_location(location) == (tier, slot)
    if tier is Tier.DEVICE:
        assert location == slot
    else:
        assert location < 0 and encode_location(tier, slot + 1) == location - 1


@given(
    layers=st.integers(1, 4),
    kv_heads=st.integers(1, 4),
    page_size=st.sampled_from([16, 32, 256, 4096]),
    head_dim=st.integers(1, 128),
    dtype=st.sampled_from(DTYPES),
    num_pages=st.integers(0, 3),
)
def test_page_spec_counts_the_bytes_of_a_pool(
    layers: int, kv_heads: int, page_size: int, head_dim: int, dtype: str, num_pages: int
) -> None:
    spec = PageSpec(layers, kv_heads, page_size, head_dim, dtype)
    shape = spec.device_shape(num_pages)
    assert shape == (layers, 2, num_pages, kv_heads, page_size, head_dim)
    pool = torch.empty(shape, dtype=torch_dtype(dtype), device="meta")
    assert spec.page_bytes * num_pages == pool.nbytes
    assert spec.page_bytes == spec.bytes_per_token * page_size == spec.layer_slice_bytes * layers


def test_page_spec_of_llama_3_8b() -> None:
    spec = PageSpec(32, 8, 256, 128, "bfloat16")
    assert (spec.bytes_per_token, spec.layer_slice_bytes, spec.page_bytes) == (128 << 10, 1 << 20, 32 << 20)


@given(st.integers(0, 10_000), st.sampled_from([16, 64, 512]))
def test_pages_for(num_tokens: int, page_size: int) -> None:
    pages = PageSpec(1, 1, page_size, 2, "float32").pages_for(num_tokens)
    assert (pages - 1) * page_size < num_tokens <= pages * page_size


@given(st.one_of(st.integers(-100, 300), st.integers(-(2**40), 2**40)))
def test_page_size_is_refused_with_a_cure(page_size: int) -> None:
    valid = page_size in {1 << power for power in range(4, 64)}
    if valid:
        assert PageSpec(1, 1, page_size, 2, "float32").page_size == page_size
        return
    with pytest.raises(ConfigError, match=f"page_size {page_size} is not a power of two >= {MIN_PAGE_SIZE}") as error:
        PageSpec(1, 1, page_size, 2, "float32")
    cure = int(str(error.value).rsplit(" ", 1)[1])
    assert PageSpec(1, 1, cure, 2, "float32").page_size == cure
    assert cure == MIN_PAGE_SIZE or cure < page_size < 2 * cure


@pytest.mark.parametrize(("page_size", "cure"), [(100, 64), (17, 16), (15, 16), (1, 16), (0, 16), (-1, 16), (257, 256)])
def test_cure_of_a_page_size(page_size: int, cure: int) -> None:
    with pytest.raises(ConfigError, match=f"; try {cure}$"):
        PageSpec(1, 1, page_size, 2, "float32")


@pytest.fixture
def pool() -> DevicePool:
    """A pool in which every number is different."""
    pool = DevicePool(PageSpec(3, 2, 16, 4, "float32"), 5, CpuDevice())
    assert not pool.data.any()
    pool.data.copy_(torch.arange(1, pool.data.numel() + 1).view_as(pool.data))
    return pool


def test_device_pool_layout(pool: DevicePool) -> None:
    """A run of neighbouring pages of one layer is one contiguous piece of memory, keys first."""
    assert pool.data.shape == (3, 2, 5, 2, 16, 4)
    assert pool.layer(1).data_ptr() == pool.data[1].data_ptr()
    assert pool.layer(2)[0, 1:4].is_contiguous()
    pool.layer(1)[1, 3].fill_(-1)
    assert (pool.data == -1).nonzero()[:, :3].unique(dim=0).tolist() == [[1, 1, 3]]


def test_device_pool_clear(pool: DevicePool) -> None:
    before = pool.data.clone()
    pool.clear([4, 1])
    assert not pool.data[:, :, [1, 4]].any()
    assert torch.equal(pool.data[:, :, [0, 2, 3]], before[:, :, [0, 2, 3]])


def test_device_pool_copy(pool: DevicePool) -> None:
    before = pool.data.clone()
    pool.copy(3, 0)
    before[:, :, 0] = before[:, :, 3]
    assert torch.equal(pool.data, before)
