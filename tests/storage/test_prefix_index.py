"""Keys of pages, the index over them, and which idle pages are given up first."""

import random
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.collisions import collide

from distkv.storage.ledger.idle_pages import IdlePages
from distkv.storage.ledger.page import Page, PageKey
from distkv.storage.ledger.page_table import PageTable
from distkv.storage.ledger.prefix_index import PrefixIndex, page_key, page_keys, root_key
from distkv.storage.ledger.shares import Shares
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.tier import Tier

DEVICE, HOST, DISK = Tier
PAGE_SIZE = 2
ROOT = b"root"


# --- keys ---


def test_a_key_is_a_chain_of_sha256_over_little_endian_tokens() -> None:
    """Catalogues hold such keys: another rule is another format."""
    first, second = page_keys(ROOT, [1, 2, 3, 2**32 - 1, 7], PAGE_SIZE)
    assert first.tokens == bytes([1, 0, 0, 0, 2, 0, 0, 0]) and first.parent == ROOT
    assert first.digest == sha256(ROOT + first.tokens).digest()
    tokens = bytes([3, 0, 0, 0]) + b"\xff" * 4
    assert second == PageKey(sha256(first.digest + tokens).digest(), first.digest, tokens)


def test_roots_do_not_meet() -> None:
    """The roots of two models, or of two salts; None is none of the texts."""
    pairs = [(model, salt) for model in ("", "a", "ab", "absalt") for salt in (None, "", "b", "salt", "saltb", "\0")]
    assert len({root_key(*pair) for pair in pairs}) == len(pairs)


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_keys_are_equal_as_far_as_all_tokens_are(one: list[int], other: list[int]) -> None:
    keys, others = list(page_keys(ROOT, one, PAGE_SIZE)), list(page_keys(ROOT, other, PAGE_SIZE))
    assert len(keys) == len(one) // PAGE_SIZE
    for end, (key, theirs) in enumerate(zip(keys, others, strict=False), 1):
        assert (key == theirs) == (one[: end * PAGE_SIZE] == other[: end * PAGE_SIZE])


# --- the index ---


def add(index: PrefixIndex, tokens: list[int]) -> list[tuple[Page, Page]]:
    """Enters a page for each full page of a sequence; returns them beside those that have their keys then."""
    pages = [(Page(number, full=True), key) for number, key in enumerate(page_keys(ROOT, tokens, PAGE_SIZE))]
    return [(page, index.add(page, key)) for page, key in pages]


@given(st.lists(st.lists(st.integers(0, 2), max_size=10), max_size=8), st.lists(st.integers(0, 2), max_size=10))
def test_the_longest_known_prefix_is_found(known: list[list[int]], wanted: list[int]) -> None:
    index = PrefixIndex()
    entered = {tuple(tokens[:end]) for tokens in known for end in range(PAGE_SIZE, len(tokens) + 1, PAGE_SIZE)}
    for tokens in known:
        add(index, tokens)
    assert len(index) == len(entered) == len(list(index))
    found = index.longest(page_keys(ROOT, wanted, PAGE_SIZE))
    count = 0
    while tuple(wanted[: (count + 1) * PAGE_SIZE]) in entered and (count + 1) * PAGE_SIZE <= len(wanted):
        count += 1
    assert [page.key for page in found] == list(page_keys(ROOT, wanted, PAGE_SIZE))[:count]


def test_a_key_is_entered_once_and_its_loser_learns_of_it() -> None:
    index = PrefixIndex()
    [(first, known), (follower, _)] = add(index, [1, 2, 3, 4])
    assert known is first
    [(second, known)] = add(index, [1, 2])
    assert known is first and second.key is None
    assert index.remove(first) == [follower] and first.key is None
    [(third, known)] = add(index, [1, 2])
    assert known is third and index.longest(page_keys(ROOT, [1, 2, 3, 4], PAGE_SIZE)) == [third, follower]
    assert index.remove(follower) == [] and index.remove(third) == [] and not len(index)
    assert not any(value for value in vars(index).values() if isinstance(value, dict)), "what is gone takes no memory"


def test_equal_keys_of_other_tokens_are_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    collide(monkeypatch)
    index = PrefixIndex()
    [(page, _)] = add(index, [1, 2])
    assert index.longest(page_keys(ROOT, [1, 3], PAGE_SIZE)) == []
    assert index.longest(page_keys(b"other", [1, 2], PAGE_SIZE)) == [], "nor is another parent"
    assert index.longest(page_keys(ROOT, [1, 2], PAGE_SIZE)) == [page]


# --- the order of giving up ---


@given(st.integers(0, 2**32))
def test_the_oldest_idle_copy_of_each_tier(seed: int) -> None:
    """Against a plain list per tier."""
    rng = random.Random(seed)
    idle, pages = IdlePages(Shares((0, 0, 0), None)), [Page(number, references=0) for number in range(6)]
    entered: list[list[Page]] = [[], [], []]
    for _ in range(40):
        page, tier = rng.choice(pages), rng.choice(list(Tier))
        if rng.random() < 0.3:
            inside = [tier for tier in Tier if page in entered[tier]]
            for tier in inside:
                idle.discard(page, tier)
                entered[tier].remove(page)
            idle.touch(page)
            for tier in inside:
                idle.add(page, tier)
                entered[tier].append(page)
        elif page.stamp and page not in entered[tier]:
            idle.add(page, tier)
            page.set_slot(tier, 0)
            entered[tier].append(page)
        else:
            idle.discard(page, tier)
            page.set_slot(tier, None)
            entered[tier] = [one for one in entered[tier] if one is not page]
        page.count_reading(tier, rng.choice([1, -page.reading[tier]]))
        for tier in Tier:
            order = sorted(entered[tier], key=lambda one: one.stamp)
            assert list(idle.pages(tier)) == order and idle.count(tier) == len(order)
            assert idle.oldest(tier, unread=False) is (order[0] if order else None)
            unread = [one for one in order if not one.reading[tier]]
            assert idle.oldest(tier) is (unread[0] if unread else None)
            others = [other for other in Tier if other is not tier]
            for saved_in in ((others[0],), (others[1],), tuple(others)):
                saved = [one for one in unread if any(one.has(other) for other in saved_in)]
                assert idle.oldest(tier, saved_in=saved_in) is (saved[0] if saved else None)


def table_of(cache: TieredCache, tokens: list[int]) -> PageTable:
    """A sequence that takes up what is known of its tokens and computes the rest at once."""
    keys = list(page_keys(ROOT, tokens, PAGE_SIZE))
    table = PageTable(cache, PAGE_SIZE)
    table.begin(cache.find(keys))
    count = len(tokens) - table.num_tokens
    assert cache.reserve(table.missing(count))
    table.append(count)
    table.commit(count, keys)
    return table


def found(cache: TieredCache, tokens: list[int]) -> int:
    return len(cache.find(page_keys(ROOT, tokens, PAGE_SIZE)))


def test_prefixes_are_given_up_from_their_end() -> None:
    """Least recently used first; a beginning that another prefix shares is as young as the youngest of them."""
    cache = TieredCache((8, 0, 0), 1)
    stem = [1, 1, 2, 2]
    for tokens in ([*stem, 3, 3, 4, 4], [9, 9, 8, 8], [*stem, 5, 5]):
        table_of(cache, tokens).release()
    assert cache.num_idle == 7
    held = [cache.allocate(0)]
    gone = []
    while cache.num_idle:
        assert cache.reserve(1)
        held.append(cache.allocate(0))
        cache.integrity_check()
        gone.append((found(cache, [*stem, 3, 3, 4, 4]), found(cache, [9, 9, 8, 8]), found(cache, [*stem, 5, 5])))
    assert gone == [(3, 2, 3), (2, 2, 3), (2, 1, 3), (2, 0, 3), (2, 0, 2), (1, 0, 1), (0, 0, 0)]


def test_a_beginning_that_was_computed_twice_outlives_its_end() -> None:
    cache = TieredCache((8, 0, 0), 1)
    stem = [1, 1, 2, 2]
    keys = [list(page_keys(ROOT, [*stem, end, end], PAGE_SIZE)) for end in (3, 4)]
    tables = [PageTable(cache, PAGE_SIZE) for _ in range(2)]
    for table in tables:  # both begin before the pages of either are known
        table.append(6)
    for table, own in zip(tables, keys, strict=True):
        table.commit(6, own)
    for table in tables:
        table.release()
    assert found(cache, [*stem, 4, 4]) == 3
    for _ in range(4 + 2):  # 4 slots are free, then two must be given up: of the first sequence, its end
        assert cache.reserve(1)
        cache.allocate(0)
    assert found(cache, [*stem, 4, 4]) >= 2


@pytest.mark.parametrize(
    "num_pages",
    [(8, 0, 0), (6, 6, 30), (8, 8, 0), (4, 2, 8)],
    ids=str,
)
def test_what_is_left_of_any_prefix_is_its_beginning(num_pages: tuple[int, int, int]) -> None:
    """With sequences that run one after another, in every tier: no page is known whose parent is not."""
    for seed in range(60):
        rng = random.Random(seed)
        cache = TieredCache(num_pages, 1, write_through=rng.random() < 0.5)
        for _ in range(30):
            tokens = [rng.randrange(2) for _ in range(rng.randint(2, 8))]
            keys = list(page_keys(ROOT, tokens, PAGE_SIZE))
            table = PageTable(cache, PAGE_SIZE)
            table.begin(cache.find(keys))
            while (count := len(tokens) - table.num_tokens) > 0:
                count = min(count, PAGE_SIZE)
                while not cache.reserve(table.missing(count)):
                    pass_on(cache)
                table.append(count)
                table.commit(count, keys)
                pass_on(cache)
            table.release()
            for _ in range(rng.randint(0, 4)):
                cache.balance()
                pass_on(cache)
            known = {page.key.digest for page in cache.index if page.key is not None}
            for page in cache.index:
                assert page.key is not None
                assert page.key.parent == ROOT or page.key.parent in known, seed
            cache.integrity_check()


def pass_on(cache: TieredCache) -> None:
    """All that was queued ends."""
    transfers, _ = cache.take_transfers()
    cache.apply([one.id for one in transfers], [], [])
    cache.journal.take()


def test_page_key_takes_any_sequence_of_tokens() -> None:
    assert page_key(ROOT, (1, 2)) == page_key(ROOT, [1, 2])
