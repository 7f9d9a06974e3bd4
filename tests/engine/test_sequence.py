"""One answer's tokens and pages, case by case."""

from typing import Any

import msgspec
import pytest
from support.history import GREEDY
from support.memory import EOS, PAGE_SIZE

from distkv.engine.protocol import EngineRequest
from distkv.engine.sequence import Sequence, most_pages
from distkv.sampling_params import SamplingParams
from distkv.storage.ledger.page_table import PageTable
from distkv.storage.ledger.prefix_index import page_keys
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.tier import Tier


def sequence_of(prompt_len: int, params: SamplingParams = GREEDY, max_tokens: int = 10, **options: Any) -> Sequence:
    cache = TieredCache((40, 0, 0), 4)
    request = EngineRequest("0", list(range(prompt_len)), params, max_tokens, 0)
    fields = {"index": 0, "number": 3, "root": b"root"} | options
    return Sequence(request, table=PageTable(cache, PAGE_SIZE), token_ids=list(request.prompt_token_ids), **fields)


def run(sequence: Sequence, count: int, num_logits: int = 0) -> tuple[int, list[int]]:
    """Has a step of so many tokens end well; returns the first page that it sent, and the ids of those."""
    sequence.table.append(count)
    plan = sequence.plan(sequence.table.num_tokens - count, count, num_logits)
    sequence.commit(count)
    assert sequence.table.num_committed == sequence.table.num_tokens
    assert (plan.table, plan.prompt_len, plan.num_logits) == (sequence.number, sequence.prompt_len, num_logits)
    assert plan.token_ids == sequence.token_ids[plan.start : plan.start + count]
    return plan.first_page, plan.pages


@pytest.mark.parametrize(
    "params, tokens, expected",
    [
        (SamplingParams(), [7], (None, None)),
        (SamplingParams(), [7, 7, 7], ("length", None)),
        (SamplingParams(), [7, EOS], ("stop", None)),
        (SamplingParams(), [7, 7, EOS], ("stop", None)),
        (SamplingParams(ignore_eos=True), [EOS], (None, None)),
        (SamplingParams(ignore_eos=True), [EOS, EOS, EOS], ("length", None)),
        (SamplingParams(stop_token_ids=[9]), [9], ("stop", 9)),
        (SamplingParams(stop_token_ids=[9]), [9, 7], (None, None)),
        (SamplingParams(stop_token_ids=[9, EOS]), [EOS], ("stop", None)),
        (SamplingParams(stop_token_ids=[9, EOS], ignore_eos=True), [7, 7, EOS], ("stop", EOS)),
    ],
)
def test_why_an_answer_ends(params: SamplingParams, tokens: list[int], expected: tuple[Any, Any]) -> None:
    """By its newest token first, and a token that the model ends with is not one that was asked for."""
    sequence = sequence_of(5, params, max_tokens=3)
    stops = frozenset(params.stop_token_ids or ())
    sequence.request = msgspec.structs.replace(sequence.request, stop_token_ids=stops)
    sequence.token_ids += tokens
    assert sequence.ending((EOS,)) == expected


@pytest.mark.parametrize(
    "prompt_len, max_tokens, num_answers, expected",
    [(16, 1, 1, 1), (16, 2, 1, 2), (15, 2, 1, 1), (15, 3, 1, 2), (32, 1, 5, 2), (32, 17, 5, 7), (33, 1, 3, 5)],
)
def test_the_last_token_needs_no_room_and_full_pages_of_a_prompt_are_shared(
    prompt_len: int, max_tokens: int, num_answers: int, expected: int
) -> None:
    request = EngineRequest("0", [5] * prompt_len, GREEDY, max_tokens, 0)
    assert most_pages(request, PAGE_SIZE, num_answers) == expected


def test_a_token_may_run_as_long_as_one_more_is_wanted() -> None:
    """One that a step under way samples, too; but the answers of a request that are not forked yet wait for theirs."""
    sequence = sequence_of(5, max_tokens=3)
    several = sequence_of(5, SamplingParams(n=2), max_tokens=3)
    for known, pending, alone, together in (
        (0, 0, False, False), (0, 1, True, False), (1, 0, True, True), (1, 1, True, True), (1, 2, False, False),
        (2, 1, False, False), (3, 0, False, False),
    ):  # fmt: skip
        for one, expected in ((sequence, alone), (several, together)):
            one.token_ids = list(range(5 + known))
            one.num_pending = pending
            assert one.may_decode == expected, (known, pending)
            assert one.num_answers == (1 if known else one.request.params.n)
            assert one.is_alone == (one.num_answers == 1)
            assert one.output_token_ids == list(range(5, 5 + known)) and one.num_output_tokens == known


def test_pages_are_sent_once_and_again_after_a_step_that_was_taken_back() -> None:
    sequence = sequence_of(100)
    assert run(sequence, 20) == (0, [0, 1])
    assert run(sequence, 12) == (2, []), "they have room"
    assert run(sequence, 1) == (2, [2])
    sequence.table.append(30)
    assert sequence.plan(33, 30, 0).pages == [3]
    sequence.rewind(30, has_run=False)
    assert sequence.table.num_tokens == 33 and sequence.num_sent == 3
    assert run(sequence, 67, 1) == (3, [3, 4, 5, 6])
    [token] = sequence.plan(100, 1, 1, pending_index=4).token_ids
    assert token == -5, "the fifth of those that the step before samples"


def test_a_page_that_a_step_has_filled_in_vain_is_begun_again() -> None:
    """Its other tokens are not what they were, where pages are rounded."""
    sequence = sequence_of(100)
    run(sequence, 20)
    sequence.table.append(3)
    sequence.rewind(3, has_run=True)
    assert sequence.table.num_tokens == 20, "it fills none"
    run(sequence, 80, 1)
    sequence.token_ids += range(12)
    run(sequence, 11)
    sequence.table.append(1)
    sequence.plan(111, 1, 1)
    sequence.rewind(1, has_run=True)
    assert sequence.table.num_tokens == sequence.table.num_committed == 96 and sequence.is_prefilling
    sequence.table.append(16)
    assert sequence.plan(96, 16, 1).pages == [sequence.table.pages[6].id]


def test_the_first_page_matters_most_then_the_newest() -> None:
    sequence = sequence_of(70)
    assert list(sequence.by_importance()) == []
    run(sequence, 70)
    assert [page.index for page in sequence.by_importance()] == [0, 4, 3, 2, 1]


def test_pages_get_keys_when_they_are_full_and_are_to_come_until_then() -> None:
    sequence = sequence_of(40)
    keys = sequence.page_keys(39)
    assert keys == list(page_keys(b"root", range(40), PAGE_SIZE)) and sequence.num_prefix_pages == 2
    assert [sequence.will_compute(index, keys[index]) for index in (0, 1)] == [True, True]
    assert not sequence.will_compute(1, keys[0]), "another page"
    run(sequence, 31)
    assert [sequence.will_compute(index, keys[index]) for index in (0, 1)] == [False, True]
    assert not sequence.will_compute(2, keys[1]), "nobody knows its tokens yet"
    assert [page.key for page in sequence.table.pages] == [keys[0], None]
    run(sequence, 1)
    assert [page.key for page in sequence.table.pages] == keys and not sequence.will_compute(1, keys[1])
    own = sequence_of(40, root=None)
    run(own, 40)
    assert own.page_keys(32) is None and [page.full for page in own.table.pages] == [True, True, False]
    ended = sequence_of(40, finished=True)
    assert ended.page_keys(39) and not ended.will_compute(0, ended.keys[0])


@pytest.mark.parametrize("prompt_len, num_copies", [(40, 1), (32, 0)])
def test_other_answers_need_a_copy_each_of_a_page_that_is_not_full(prompt_len: int, num_copies: int) -> None:
    sequence = sequence_of(prompt_len, SamplingParams(n=4))
    assert (sequence.num_fork_pages(prompt_len - 1), sequence.num_fork_pages(prompt_len)) == (0, 3 * num_copies)
    run(sequence, 20)
    assert (sequence.num_fork_pages(20), sequence.num_fork_pages(prompt_len - 20)) == (
        3 * (prompt_len == 40), 3 * num_copies
    )  # fmt: skip


@pytest.mark.parametrize("prompt_len, num_copies", [(40, 1), (32, 0)])
def test_another_answer_begins_where_the_first_one_is(prompt_len: int, num_copies: int) -> None:
    sequence = sequence_of(prompt_len, turn=4)
    sequence.cached_tiers = [Tier.DEVICE]
    run(sequence, prompt_len, 1)
    fork, copy = sequence.fork(1, 8)
    assert (fork.index, fork.number, fork.turn, fork.num_cached) == (1, 8, 4, (16, 0, 0))
    assert fork.token_ids == sequence.token_ids and fork.keys == sequence.keys and fork.root == sequence.root
    sequence.token_ids.append(7)
    sequence.page_keys(len(sequence.token_ids))
    assert fork.num_output_tokens == 0, "what either of them adds is its own"
    assert fork.table.pages[:2] == sequence.table.pages[:2]
    assert copy == ((sequence.table.pages[2], fork.table.pages[2]) if num_copies else None)
    assert fork.num_sent == 0 and not sequence.is_prefilling and not fork.is_prefilling
