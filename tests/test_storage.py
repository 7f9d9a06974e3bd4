"""Pages: their shapes, who holds them, and that no sequence ever sees another's tokens."""

from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from distkv.errors import CapacityError, ConfigError
from distkv.storage.device_pool import DevicePool
from distkv.storage.page_allocator import PageAllocator
from distkv.storage.page_size import MIN_PAGE_SIZE
from distkv.storage.page_spec import PageSpec
from distkv.storage.page_table import PageTable

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
    """PageAllocator against a dict of slot -> holders."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES)
        self.holders: dict[int, int] = {}  # only slots with a holder

    @rule(
        target=held,
        count=st.one_of(st.integers(0, 3), st.integers(0, NUM_PAGES + 2)),
        after=st.one_of(st.none(), st.integers(0, NUM_PAGES - 1)),
    )
    def allocate(self, count: int, after: int | None):
        free = {slot for slot in range(NUM_PAGES) if slot not in self.holders}
        if count > len(free):
            with pytest.raises(CapacityError, match=f"{count} KV pages.* {len(free)} of {NUM_PAGES} are free"):
                self.allocator.allocate(count, after)
            return multiple()
        taken = self.allocator.allocate(count, after)
        assert len(set(taken)) == len(taken) == count
        assert set(taken) <= free
        if count:
            check_neighbours(taken, free, after)
        self.holders.update(dict.fromkeys(taken, 1))
        return multiple(*taken)

    @rule(slots=st.lists(held, max_size=4, unique=True))
    def share(self, slots: list[int]) -> None:
        slots = [slot for slot in slots if slot in self.holders]
        self.allocator.share(slots)
        for slot in slots:
            self.holders[slot] += 1

    @rule(slots=st.lists(held, max_size=4, unique=True))
    def release(self, slots: list[int]) -> None:
        slots = [slot for slot in slots if slot in self.holders]
        self.allocator.release(slots)
        for slot in slots:
            self.holders[slot] -= 1
            if not self.holders[slot]:
                del self.holders[slot]

    @precondition(lambda self: len(self.holders) < NUM_PAGES)
    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        free = data.draw(st.sampled_from([slot for slot in range(NUM_PAGES) if slot not in self.holders]))
        with pytest.raises(ValueError, match=f"slot {free} "):
            self.allocator.share([free])
        with pytest.raises(ValueError, match=f"slot {free} "):
            self.allocator.release([free])

    @invariant()
    def agrees(self) -> None:
        self.allocator.integrity_check()
        assert self.allocator.num_free == NUM_PAGES - len(self.holders)
        assert [self.allocator.references(slot) for slot in range(NUM_PAGES)] == [
            self.holders.get(slot, 0) for slot in range(NUM_PAGES)
        ]


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=3 * settings().max_examples)


class TableMachine(RuleBasedStateMachine):
    """Page tables over one allocator against plain lists of tokens; every token has a number of its own, and the pool
    is a dict of (slot, offset) -> token."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES)
        self.pool: dict[tuple[int, int], int] = {}
        self.tokens: dict[PageTable, list[int]] = {}
        self.next_token = 0

    def state(self) -> list[object]:
        """All that a refused operation must leave alone."""
        references = [self.allocator.references(slot) for slot in range(NUM_PAGES)]
        return [references, [(list(table.slots), table.num_tokens) for table in self.tokens]]

    @rule(target=tables)
    def new(self) -> PageTable:
        table = PageTable(self.allocator, PAGE_SIZE)
        self.tokens[table] = []
        return table

    @rule(table=tables, count=st.one_of(st.integers(0, 3), st.integers(0, 5 * PAGE_SIZE)))
    def append(self, table: PageTable, count: int) -> None:
        tokens = self.tokens[table]
        needed = -(-(len(tokens) + count) // PAGE_SIZE) - len(table.slots)
        if needed > self.allocator.num_free:
            before = self.state()
            with pytest.raises(CapacityError):
                table.append(count)
            assert self.state() == before
            return
        old = list(table.slots)
        taken = table.append(count)
        assert len(taken) == needed
        assert table.slots == old + taken
        for _ in range(count):
            self.pool[table.slots[len(tokens) // PAGE_SIZE], len(tokens) % PAGE_SIZE] = self.next_token
            tokens.append(self.next_token)
            self.next_token += 1

    @rule(target=tables, table=tables)
    def fork(self, table: PageTable):
        tokens = self.tokens[table]
        if len(tokens) % PAGE_SIZE and not self.allocator.num_free:
            before = self.state()
            with pytest.raises(CapacityError):
                table.fork()
            assert self.state() == before
            return multiple()
        free = self.allocator.num_free
        other, copy = table.fork()
        full = len(tokens) // PAGE_SIZE
        assert other.slots[:full] == table.slots[:full]
        assert free - self.allocator.num_free == (len(tokens) % PAGE_SIZE > 0)
        if copy is not None:
            source, target = copy
            self.pool |= {(target, offset): self.pool.get((source, offset), -1) for offset in range(PAGE_SIZE)}
        self.tokens[other] = list(tokens)
        return other

    @rule(table=consumes(tables))
    def release(self, table: PageTable) -> None:
        table.release()
        assert table.slots == [] and table.num_tokens == 0
        del self.tokens[table]

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for table, tokens in self.tokens.items():
            assert table.num_tokens == len(tokens)
            assert len(table.slots) == -(-len(tokens) // PAGE_SIZE)
            read = [self.pool[table.slots[at // PAGE_SIZE], at % PAGE_SIZE] for at in range(len(tokens))]
            assert read == tokens

    @invariant()
    def references_are_the_tables(self) -> None:
        self.allocator.integrity_check()
        held = Counter(slot for table in self.tokens for slot in table.slots)
        assert [self.allocator.references(slot) for slot in range(NUM_PAGES)] == [held[s] for s in range(NUM_PAGES)]
        assert self.allocator.num_free == NUM_PAGES - len(held)


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=3 * settings().max_examples)


@settings(max_examples=8 * settings().max_examples)
@given(
    free=st.sets(st.integers(0, NUM_PAGES - 1), min_size=1),
    count=st.integers(1, NUM_PAGES),
    after=st.one_of(st.none(), st.integers(0, NUM_PAGES - 1)),
)
def test_allocate_from_any_free_slots(free: set[int], count: int, after: int | None) -> None:
    allocator = PageAllocator(NUM_PAGES)
    allocator.allocate(NUM_PAGES)
    allocator.release(list(free))
    count = min(count, len(free))
    taken = allocator.allocate(count, after)
    assert len(set(taken)) == count and set(taken) <= free
    check_neighbours(taken, free, after)
    allocator.integrity_check()


def test_fresh_pool_hands_out_one_run() -> None:
    assert PageAllocator(9).allocate(7) == list(range(7))


def test_a_growing_sequence_stays_one_run() -> None:
    """The page behind the last one is taken though a lower one is free."""
    allocator = PageAllocator(8)
    first, table = PageTable(allocator, PAGE_SIZE), PageTable(allocator, PAGE_SIZE)
    first.append(2 * PAGE_SIZE)
    for _ in range(3):
        table.append(PAGE_SIZE)
        if first.slots:
            first.release()
    assert table.slots == [2, 3, 4]


def test_refused_operations_change_nothing() -> None:
    allocator = PageAllocator(3)
    table = PageTable(allocator, PAGE_SIZE)
    table.append(2 * PAGE_SIZE + 1)
    for refused in (table.fork, lambda: table.append(PAGE_SIZE)):
        with pytest.raises(CapacityError, match="1 KV pages are needed and 0 of 3 are free; raise device_kv_bytes"):
            refused()
        assert (table.slots, table.num_tokens) == ([0, 1, 2], 2 * PAGE_SIZE + 1)
        assert [allocator.references(slot) for slot in range(3)] == [1, 1, 1]


def test_the_longest_runs_are_taken_when_none_is_long_enough() -> None:
    allocator = PageAllocator(10)
    allocator.allocate(10)
    allocator.release([0, 2, 3, 5, 6, 7])
    assert allocator.allocate(5) == [5, 6, 7, 2, 3]


def test_integrity_check_notices() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(2)
    allocator._references[0] = 0
    with pytest.raises(AssertionError):
        allocator.integrity_check()


@given(
    layers=st.integers(1, 4),
    kv_heads=st.integers(1, 4),
    page_size=st.sampled_from([16, 32, 256, 4096]),
    head_dim=st.integers(1, 128),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    num_pages=st.integers(0, 3),
)
def test_page_spec_counts_the_bytes_of_a_pool(
    layers: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype, num_pages: int
) -> None:
    spec = PageSpec(layers, kv_heads, page_size, head_dim, dtype)
    shape = spec.device_shape(num_pages)
    assert shape == (layers, 2, num_pages, kv_heads, page_size, head_dim)
    pool = torch.empty(shape, dtype=dtype, device="meta")
    assert spec.page_bytes * num_pages == pool.nbytes
    assert spec.page_bytes == spec.bytes_per_token * page_size == spec.layer_slice_bytes * layers


def test_page_spec_of_llama_3_8b() -> None:
    spec = PageSpec(32, 8, 256, 128, torch.bfloat16)
    assert (spec.bytes_per_token, spec.layer_slice_bytes, spec.page_bytes) == (128 << 10, 1 << 20, 32 << 20)


@given(st.integers(0, 10_000), st.sampled_from([16, 64, 512]))
def test_pages_for(num_tokens: int, page_size: int) -> None:
    pages = PageSpec(1, 1, page_size, 2, torch.float32).pages_for(num_tokens)
    assert (pages - 1) * page_size < num_tokens <= pages * page_size


@given(st.one_of(st.integers(-100, 300), st.integers(-(2**40), 2**40)))
def test_page_size_is_refused_with_a_cure(page_size: int) -> None:
    valid = page_size in {1 << power for power in range(4, 64)}
    if valid:
        assert PageSpec(1, 1, page_size, 2, torch.float32).page_size == page_size
        return
    with pytest.raises(ConfigError, match=f"page_size {page_size} is not a power of two >= {MIN_PAGE_SIZE}") as error:
        PageSpec(1, 1, page_size, 2, torch.float32)
    cure = int(str(error.value).rsplit(" ", 1)[1])
    assert PageSpec(1, 1, cure, 2, torch.float32).page_size == cure
    assert cure == MIN_PAGE_SIZE or cure < page_size < 2 * cure


@pytest.mark.parametrize(("page_size", "cure"), [(100, 64), (17, 16), (15, 16), (1, 16), (0, 16), (-1, 16), (257, 256)])
def test_cure_of_a_page_size(page_size: int, cure: int) -> None:
    with pytest.raises(ConfigError, match=f"; try {cure}$"):
        PageSpec(1, 1, page_size, 2, torch.float32)


@pytest.fixture
def pool() -> DevicePool:
    """A pool in which every number is different."""
    pool = DevicePool(PageSpec(3, 2, 16, 4, torch.float32), 5, torch.device("cpu"))
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
