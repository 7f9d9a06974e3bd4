"""Which tokens run in a step, case by case: a scheduler by itself, whose steps all end well."""

import pytest
from support.memory import PAGE_SIZE
from support.scheduler_steps import Steps

from distkv.engine.scheduler import MAX_EXPECTED
from distkv.errors import CapacityError
from distkv.storage.tier import Tier

# --- how prompts share a step ---


def test_of_the_prompts_behind_the_first_a_lower_priority_goes_before_a_shorter_one() -> None:
    steps = Steps()
    steps.add("first", 1000)
    steps.add("short", 20, priority=1)
    steps.add("long", 200)
    assert steps.step() == {"first": 32, "long": 32}
    steps.add("another", 180)
    assert steps.step() == {"first": 32, "long": 32}, "of one priority the one with the fewest tokens to go"
    steps.add("urgent", 500, priority=-1)
    assert steps.step() == {"urgent": 32, "long": 32}, "the half of the first is that of the most urgent"


def test_what_the_others_leave_goes_to_the_first() -> None:
    steps = Steps()
    steps.add("a", 1000)
    assert steps.step() == {"a": 64}
    steps.add("b", 10)
    assert steps.step() == {"a": 48, "b": 10}, "six tokens would end before a page border"
    assert steps.step() == {"b": 1, "a": 48}, "answers first"


def test_the_half_of_the_first_is_rounded_up() -> None:
    steps = Steps(max_num_batched_tokens=31)
    steps.add("a", 100)
    steps.add("b", 100)
    assert steps.step() == {"a": 16, "b": 15}


def test_chunks_end_on_page_borders_where_they_can() -> None:
    steps = Steps(max_num_batched_tokens=10)
    steps.add("a", 37)
    assert [steps.step()["a"] for _ in range(6)] == [10, 6, 10, 6, 5, 1]
    steps = Steps(max_num_batched_tokens=20)
    steps.add("a", 20)
    assert steps.step() == {"a": 20}, "the last chunk needs no border"


def test_answers_may_take_the_whole_step() -> None:
    steps = Steps(max_num_batched_tokens=2)
    steps.add("a", 1, n=3)
    steps.step()
    steps.add("b", 10)
    assert steps.step() == {"a": 2} and "b" in steps.running()
    for index in range(3):
        assert steps.scheduler.abort("a", index)
    assert steps.step() == {"b": 2}


@pytest.mark.parametrize("budget, chunk, read", [(64, 64, 64), (31, 16, 16), (10, 16, 10)])
def test_a_prompt_of_random_pages_costs_nothing_of_the_budget(budget: int, chunk: int, read: int) -> None:
    """A step fills as many whole pages as it may read at most, one at least; the last tokens are read."""
    steps = Steps(max_num_batched_tokens=budget)
    steps.add("a", 2 * chunk + 5, synthetic_kv_seed=1)
    steps.add("b", 200)
    assert steps.step() == {"a": chunk, "b": read}
    assert steps.step()["a"] == chunk
    assert steps.step()["a"] == 5


def test_a_draft_is_for_the_next_step_alone() -> None:
    """One whose step could not be made is not run when the answer has given its pages up and reads them again."""
    steps = Steps()
    steps.add("a", 40)
    steps.step()
    one = steps.sequence("a")
    one.draft, one.is_drafting, one.lacks_room, one.is_guessed = [5, 6], True, True, True
    assert steps.scheduler.preempt() is one
    assert steps.step() == {"a": 41} and not one.draft and not one.is_drafting


@pytest.mark.parametrize("way", ["abort", "refuse"])
def test_one_that_gave_its_pages_up_and_is_gone_is_waited_for_no_more(way: str) -> None:
    """Another one of the same prompt, which waited for its next page, computes that itself."""
    steps = Steps(enable_prefix_caching=True)
    steps.add("a", 200)
    steps.step()
    steps.add("b", 200, token=ord("a"))
    assert steps.step() == {"a": 64} and steps.waiting() == ["b"]
    one = steps.sequence("a")
    one.lacks_room, one.is_guessed = True, True
    assert steps.scheduler.preempt() is one and steps.waiting() == ["a", "b"]
    if way == "abort":
        assert not steps.scheduler.abort("a")
    else:
        assert steps.scheduler.refuse() is one.request
    steps.cache.reset()  # others took the room of the pages that it had computed
    assert steps.step() == {"b": 64}


# --- room on the device ---


@pytest.mark.parametrize(
    "num_held, expected",
    [
        (3, {"a": 1, "b": 32, "d": 10, "c": 16}),
        (4, {"a": 1, "b": 32, "d": 10}),
        (5, {"a": 1, "b": 32}),
        (6, {"a": 1, "d": 10}),
        (7, {"a": 1}),
    ],
)
def test_a_chunk_that_does_not_fit_waits_whole_and_a_smaller_one_passes(
    num_held: int, expected: dict[str, int]
) -> None:
    steps = Steps(num_pages=8, num_host_pages=100)
    steps.add("a", 10)
    assert steps.step() == {"a": 10}
    for name, length in (("b", 200), ("c", 100), ("d", 10)):
        steps.add(name, length)
    assert steps.step(num_held=num_held) == expected


def test_an_answer_waits_for_the_page_of_its_next_token() -> None:
    steps = Steps(num_pages=4)
    for name, length in (("a", PAGE_SIZE), ("b", PAGE_SIZE - 1), ("c", PAGE_SIZE)):
        steps.add(name, length, max_tokens=1 if name == "c" else 3)
    steps.step()
    assert steps.step(num_held=3) == {"b": 1}, "whose page has room; c has had its one token"
    assert steps.step(num_held=3) == {"a": 1}


def test_the_copies_of_a_prompts_last_page_count_too() -> None:
    """Those that its other answers need when it has been read."""
    for num_held, expected in ((6, {"a": 10}), (7, {})):
        steps = Steps(num_pages=8)
        steps.add("a", 10, n=2, max_tokens=1)
        assert len(steps.scheduler.waiting) == 1
        assert {one.request.request_id: count for one, count in steps.scheduler.schedule(num_held, None)} == expected


def test_all_but_one_may_be_left_out() -> None:
    steps = Steps()
    steps.add("a", 100)
    steps.add("b", 100)
    steps.step()
    steps.sequence("b").is_parked = True
    assert steps.step(only=steps.sequence("b")) == {"b": 64}
    assert steps.step() == {"a": 64}


# --- who is admitted ---


def test_seats_are_those_of_all_answers_and_nobody_is_passed() -> None:
    steps = Steps(max_num_seqs=3)
    steps.add("a", 20, n=2)
    steps.add("b", 20, n=2)
    steps.add("c", 20)
    assert steps.step() == {"a": 20} and steps.waiting() == ["b", "c"]
    assert steps.step() == {"a": 2} and steps.running() == ["a", "a"]
    [ended] = steps.scheduler.abort("a", 1)
    assert ended.index == 1 and ended.finished
    assert steps.scheduler.abort("a", 1) == [], "it has ended already"
    assert steps.step() == {"a": 1, "b": 20} and steps.waiting() == ["c"]
    steps.finish("a")
    assert steps.step() == {"b": 2, "c": 20}
    assert steps.scheduler.abort("b", 0)[0].index == 0
    assert steps.step() == {"b": 1, "c": 1}


def test_a_request_that_waits_may_be_taken_back() -> None:
    steps = Steps(max_num_seqs=1)
    for name in "abc":
        steps.add(name, 20)
    steps.step()
    assert steps.scheduler.abort("b") == [] and steps.waiting() == ["c"]
    assert steps.scheduler.refuse() is None, "a may end"
    steps.add("d", 20)
    steps.finish("a")
    refused = [steps.scheduler.refuse() for _ in range(3)]
    assert [one and one.request_id for one in refused] == ["c", "d", None] and not steps.waiting()


def test_chunks_of_all_that_are_admitted_fit_on_the_device() -> None:
    """Beside a page of every other answer, unless all pages do."""
    steps = Steps(num_pages=6, num_host_pages=100)
    steps.add("a", 10, max_tokens=10)
    steps.add("b", 100)
    steps.add("c", 10, max_tokens=10)
    steps.step()
    assert steps.running() == ["a", "b"], "a chunk of four pages, and a page of each"
    steps.finish("a")
    steps.step()
    assert steps.running() == ["b", "c"]
    steps.add("d", 10, max_tokens=10)
    steps.step()
    assert steps.running() == ["b", "c", "d"], "the prompt of b has been read"
    steps = Steps(num_pages=5, num_host_pages=100)
    steps.add("a", 10, max_tokens=10)
    steps.add("b", 100)
    steps.step()
    assert steps.running() == ["a"]
    steps = Steps(num_pages=8, num_host_pages=100)
    for name, length in (("a", 100), ("b", 30), ("c", 30), ("d", 10)):
        steps.add(name, length)
    steps.step()
    steps.add("e", 10)
    assert "e" not in steps.step(), "behind the chunks of a, however small those of c and d are"
    steps = Steps(num_pages=6, num_host_pages=100)
    for name in "abcdef":
        steps.add(name, 10, max_tokens=1)
    steps.step()
    assert steps.running() == list("abcdef"), "all that there is fits"


def test_what_prompts_need_is_promised_once() -> None:
    """Over all tiers, to those that run, and what they share counts once."""
    steps = Steps(enable_prefix_caching=True, num_pages=10)
    steps.add("a", 6 * PAGE_SIZE, max_tokens=1)
    steps.add("b", 5 * PAGE_SIZE, max_tokens=1)
    steps.add("c", 4 * PAGE_SIZE, max_tokens=1)
    for _ in range(3):
        steps.step()
        assert steps.running() == ["a"], "nobody passes b"
    steps.scheduler.abort("b")
    steps.add("d", 9 * PAGE_SIZE, token=ord("a"), max_tokens=1)
    steps.step()
    assert steps.running() == ["a", "c"]
    steps.finish("c")
    steps.step()
    assert steps.running() == ["a", "d"], "five pages of a's"
    for name in "ad":
        steps.finish(name)
    steps.add("e", 3 * PAGE_SIZE, max_tokens=1)
    steps.step()
    steps.add("f", 8 * PAGE_SIZE, token=ord("a"), max_tokens=1)
    steps.step()
    assert steps.running() == ["e"], "pages that nobody holds may have to go"
    steps.finish("e")
    steps.step()
    assert steps.running() == ["f"]


# --- what is known of prompts ---


def test_what_is_known_of_a_prompt_is_taken_up_and_told_by_tier() -> None:
    steps = Steps(enable_prefix_caching=True, num_host_pages=50)
    steps.add("old", 5 * PAGE_SIZE + 1, token=5)
    while "old" not in steps.running() or steps.sequence("old").is_prefilling:
        steps.step()
    pages = list(steps.sequence("old").table.pages)
    steps.finish("old")
    assert all(page.has(Tier.HOST) for page in pages[:5])
    for page in pages[1:3]:
        steps.cache._ledger.drop(page, Tier.DEVICE)
    steps.add("new", 4 * PAGE_SIZE, token=5)
    assert steps.scheduler.expected_pages() == pages[:3], "the last token of a prompt is run"
    assert steps.step() == {"new": 16}
    assert steps.sequence("new").num_cached == (PAGE_SIZE, 2 * PAGE_SIZE, 0)
    assert steps.scheduler.expected_pages() == []
    steps.add("other", 4 * PAGE_SIZE, token=5, cache_salt="of another tenant")
    assert steps.scheduler.expected_pages() == []


def test_pages_of_those_at_the_head_of_the_line_are_expected() -> None:
    steps = Steps(enable_prefix_caching=True, max_num_seqs=1)
    names = [chr(97 + number) for number in range(MAX_EXPECTED + 2)]
    for name in names:
        steps.add(name, PAGE_SIZE + 1, max_tokens=1)
    for name in names:
        assert steps.step() == {name: PAGE_SIZE + 1}
        steps.finish(name)
    steps.add("z", 10)
    steps.step()
    for name in names:
        steps.add(name, PAGE_SIZE + 1)
    waiting = steps.scheduler.waiting
    expected = steps.scheduler.expected_pages()
    assert expected == [page for one in waiting[:MAX_EXPECTED] for page in one.expected]
    assert len(expected) == MAX_EXPECTED


def test_what_is_known_of_a_waiting_prompt_counts_as_used() -> None:
    steps = Steps(enable_prefix_caching=True, num_pages=8, max_num_seqs=1)
    for name in "ab":
        steps.add(name, 3 * PAGE_SIZE, max_tokens=1)
        steps.step()
        steps.finish(name)
    steps.add("c", 4 * PAGE_SIZE, max_tokens=1)
    steps.scheduler.schedule(0, None)
    steps.add("again", 3 * PAGE_SIZE + 1, token=ord("a"))
    assert steps.cache.reserve(4)
    steps.add("too late", 3 * PAGE_SIZE + 1, token=ord("b"))
    assert [len(one.expected) for one in steps.scheduler.waiting] == [3, 1]


def test_one_waits_for_the_page_that_another_computes_and_lets_others_pass() -> None:
    steps = Steps(enable_prefix_caching=True)
    steps.add("a", 100, token=5)
    steps.add("b", 100, token=5)
    steps.add("c", 10)
    assert steps.step() == {"a": 48, "c": 10}
    assert steps.step()["a"] == 52 and steps.waiting() == ["b"]
    assert steps.step() == {"a": 1, "c": 1, "b": 4}, "all full pages are known"
    assert steps.sequence("b").num_cached == (96, 0, 0)
    steps = Steps(enable_prefix_caching=True)
    for name, length in (("a", 97), ("b", 1000), ("c", 500)):
        steps.add(name, length, token=None if name == "c" else 5)
    while steps.waiting():
        steps.step()
    assert steps.running() == ["a", "c", "b"]
    steps.step()
    assert steps.step() == {"a": 1, "b": 32, "c": 16}, "b came before c, and has the half of the first"


@pytest.mark.parametrize("ends", ["abort", "park", "salt", "random", "off"])
def test_nobody_waits_for_a_page_that_may_never_come(ends: str) -> None:
    steps = Steps(enable_prefix_caching=ends != "off")
    steps.add("a", 200, token=5, synthetic_kv_seed=1 if ends == "random" else None)
    steps.add("b", 200, token=5, cache_salt="of another tenant" if ends == "salt" else None)
    steps.step()
    if ends == "abort":
        steps.finish("a")
    elif ends == "park":
        steps.sequence("a").is_parked = True
    steps.step()
    assert "b" in steps.running()


# --- what can never run ---


def test_a_request_that_may_need_more_than_all_tiers_hold_is_refused_with_the_sizes() -> None:
    steps = Steps(num_pages=5, num_host_pages=3, num_disk_pages=2)
    most = 10 * PAGE_SIZE
    steps.add("a", most - 19, max_tokens=20)  # the last token is never read
    message = (
        r"may need 11 KV pages \(110 bytes\) for 141 prompt tokens and up to 21 more, n=1; the tiers hold 10 "
        r"\(100 bytes; device 5, host 3, disk 2\)"
    )
    with pytest.raises(CapacityError, match=message):
        steps.add("b", most - 19, max_tokens=21)
    steps.add("c", 2 * PAGE_SIZE, n=2, max_tokens=65)  # two pages that both share, and four each
    with pytest.raises(CapacityError, match="may need 12 KV pages"):
        steps.add("d", 2 * PAGE_SIZE, n=2, max_tokens=66)


def test_more_answers_than_seats_are_refused() -> None:
    steps = Steps(max_num_seqs=2)
    steps.add("a", 10, n=2)
    with pytest.raises(CapacityError, match="n is 3 and max_num_seqs 2"):
        steps.add("b", 10, n=3)


def test_a_step_that_the_device_cannot_hold_is_refused() -> None:
    steps = Steps(num_pages=5, num_host_pages=100)
    steps.add("a", 200)  # chunks of four pages, and one of the answer
    steps.add("b", 20, n=3, max_tokens=1)  # the chunk needs two of these
    steps.add("c", 80, n=2, max_tokens=1)  # and here all that it ever needs fits
    with pytest.raises(CapacityError, match=r"a step of the request writes 6 KV pages, n=2; the device holds 5"):
        steps.add("d", 200, n=2)


def test_answers_that_were_begun_are_taken_though_the_device_has_no_room_to_read_them_beside_each_other() -> None:
    """They are longer than the prompt that their request was taken with, and can be read one after the other."""
    steps = Steps(num_pages=5, num_host_pages=20, max_model_len=100)
    steps.add("a", 40, n=2, max_tokens=40)
    steps.finish("a")
    assert not steps.step()
    steps.add("a", 40, n=2, max_tokens=40, begun={0: [7] * 30, 1: [7] * 30})
    with pytest.raises(CapacityError, match="n=3; the device holds 5"):
        steps.add("b", 40, n=3, max_tokens=40)
    assert steps.step() == {"a": 64}
    for _ in range(20):
        steps.step()
    assert steps.scheduler.abort("a", 0) and steps.step()
