"""Which waiting requests go ahead: those that share most of their prompt with running ones, within bounds."""

from pathlib import Path
from typing import Any

import pytest
from support.llms import tiered
from support.memory import PAGE_SIZE
from support.prompts import random_prompt
from support.scheduler_steps import Steps

from distkv import SamplingParams

BOOK = 10 * PAGE_SIZE
SEATS = 4


def two_books(num_pages: int = 13, **options: Any) -> Steps:
    """A scheduler that knows the books x and y, most of whose pages the device has no room for."""
    sizes = {"num_pages": num_pages, "num_host_pages": 100, "max_num_seqs": SEATS, "enable_prefix_caching": True}
    steps = Steps(**(sizes | options))
    for book in "xy":
        steps.add(book, BOOK, max_tokens=1)
        while steps.step():
            pass
        steps.finish(book)
    return steps


def ask(steps: Steps, *names: str, **options: Any) -> None:
    """Adds requests about the book of their first letter."""
    for name in names:
        steps.add(name, BOOK + 5, **options)


def test_those_about_one_cold_book_run_together_and_then_those_about_the_next() -> None:
    steps = two_books()
    ask(steps, "x1", "y1", "x2", "y2", "x3", "y3", "x4", "y4")
    assert steps.step() == {"x1": 5, "x2": 5, "x3": 5, "x4": 5}, "one book is brought, and all questions read"
    assert steps.step() == {"x1": 1, "x2": 1, "x3": 1, "x4": 1}
    for name in steps.running():
        steps.finish(name)
    assert list(steps.step()) == ["y1", "y2", "y3", "y4"]


def test_questions_need_room_for_themselves_not_for_the_book_that_is_known() -> None:
    """A chunk of a book would take 4 of the 6 pages, and leave two for other answers."""
    steps = two_books(num_pages=6)
    ask(steps, "x1", "x2", "x3", "x4")
    assert steps.step() == {"x1": 5, "x2": 5, "x3": 5, "x4": 5}


def test_in_order_where_all_pages_lie_on_the_device() -> None:
    steps = two_books(num_pages=60)
    ask(steps, "x1", "y1", "x2", "y2", "x3")
    steps.step()
    assert steps.running() == ["x1", "y1", "x2", "y2"]


def test_the_first_in_line_is_passed_by_as_many_as_run_at_a_time_and_no_more() -> None:
    steps = two_books()
    ask(steps, *(f"x{number}" for number in range(SEATS)))
    steps.step()
    ask(steps, "y", *(f"x{number}" for number in range(SEATS, 3 * SEATS)))
    for number in range(SEATS):
        steps.finish(f"x{number}")
        steps.step()
        assert steps.waiting()[0] == "y" and steps.running()[-1] == f"x{SEATS + number}"
    steps.finish(f"x{SEATS}")
    steps.step()
    assert steps.running()[-1] == "y"
    steps.finish(f"x{SEATS + 1}")
    steps.step()
    assert steps.running()[-1] == f"x{2 * SEATS}", "y is not in its way any more"


def test_who_would_go_ahead_and_has_no_room_is_in_nobodys_way() -> None:
    """For want of seats, or of pages over all tiers; those in order are admitted meanwhile."""
    steps = two_books(num_host_pages=20)
    ask(steps, "x1", "x2")
    steps.step()
    ask(steps, "y")
    ask(steps, "x3", n=3)
    steps.step()
    assert steps.running() == ["x1", "x2", "y"], "x3 has three answers, and there were two seats"
    steps.finish("y")
    steps.finish("x3")
    ask(steps, "z", max_tokens=2)
    ask(steps, "x4", max_tokens=20 * PAGE_SIZE)
    steps.step()
    assert steps.running() == ["x1", "x2", "z"], "x4 may need what the others have"


def test_nobody_of_a_lower_priority_goes_ahead() -> None:
    steps = two_books()
    ask(steps, "x1", "x2", "x3", "x4")
    steps.step()
    ask(steps, "x5", priority=1)
    ask(steps, "y")
    steps.finish("x1")
    steps.step()
    assert steps.running()[-1] == "y"


@pytest.mark.parametrize("shared, is_ahead", [(6, True), (5, False)])
def test_those_go_ahead_that_share_most_of_their_prompt(shared: int, is_ahead: bool) -> None:
    steps = two_books()
    ask(steps, "x1", "x2", "x3", "x4")
    steps.step()
    ask(steps, "y")
    tokens = [ord("x")] * (shared * PAGE_SIZE) + [7] * ((10 - shared) * PAGE_SIZE + 1)
    steps.add_tokens("part of x", tokens)
    steps.finish("x1")
    steps.step()
    assert steps.running()[-1] == ("part of x" if is_ahead else "y")


def test_books_asked_in_turns_cost_an_llm_no_more_bytes_than_one_after_the_other(tiny_model: Path) -> None:
    """With seats for half of the questions. And an answer is the one to its question asked alone."""
    books = [random_prompt(8 * PAGE_SIZE, seed) for seed in (1, 2)]
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    with tiered(tiny_model, (14, 60, 0), max_num_seqs=3, max_num_batched_tokens=112) as llm:

        def streamed(prompts: list[list[int]]) -> tuple[int, list[list[int]]]:
            llm.generate([random_prompt(13 * PAGE_SIZE, 3)], params, cache_salt="another", use_tqdm=False)
            before = llm.stats().bytes_moved.get("host_streamed", 0)
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return llm.stats().bytes_moved["host_streamed"] - before, [one.outputs[0].token_ids for one in outputs]

        llm.generate(books, params, use_tqdm=False)
        asked = [[*book, 10 + number] for number in range(3) for book in books]
        one_by_one = [streamed([prompt]) for prompt in asked]
        by_book, answers = streamed(asked[::2] + asked[1::2])
        in_turns, answers_in_turns = streamed(asked)
    assert in_turns == by_book == sum(num_bytes for num_bytes, _ in one_by_one) // 3 > 0
    assert answers == [answer for _, [answer] in one_by_one[::2] + one_by_one[1::2]]
    assert answers_in_turns == [answer for _, [answer] in one_by_one]
