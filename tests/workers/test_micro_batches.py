"""How steps are cut into micro-batches: nothing is lost, and the number is what pays."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import TINY

from distkv.workers.attention.host_share import shared_pages
from distkv.workers.micro_batches import StepCosts, _part, cut_step
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import MAX_DECODE_TOKENS, step_tokens

LLAMA_8B = StepCosts.of(
    ModelConfig.from_dict(
        TINY
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"head_dim": 128}
    )
)
PAGE = 16


def sequence(start: int, count: int, num_logits: int = 1, first_page: int = 0, cold: int = 0) -> SequenceStep:
    """With its first `cold` pages below the device."""
    pages = np.arange(first_page, first_page + -(-(start + count) // PAGE))
    pages[:cold] = -1 - pages[:cold]
    return SequenceStep(list(range(count)), start, pages, start + count, num_logits)


def cut(steps: list[SequenceStep], num_stages: int = 2) -> list[list[SequenceStep]]:
    return cut_step(steps, LLAMA_8B, num_stages, PAGE)


@given(st.data(), st.integers(2, 5))
def test_rows_stay_in_order(data: st.DataObject, num_stages: int) -> None:
    """Put together again, micro-batches are the step: tokens, positions, pages and wanted rows."""
    steps = []
    for index in range(data.draw(st.integers(1, 6))):
        start, count = data.draw(st.integers(0, 5000)), data.draw(st.sampled_from([1, 3, 8, 9, 40, 700]))
        cold = data.draw(st.integers(0, start // PAGE))
        steps.append(sequence(start, count, data.draw(st.integers(0, count)), 1000 * index, cold))
    batches = cut(steps, num_stages)
    whole, parts = step_tokens(steps, PAGE), [step_tokens(batch, PAGE) for batch in batches]
    for name in ("token_ids", "positions", "context", "page", "offset"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name)), name
    firsts = np.cumsum([0, *(len(part.token_ids) for part in parts)])
    rows = [part.logit_rows + first for part, first in zip(parts, firsts, strict=False)]
    assert np.array_equal(np.concatenate(rows), whole.logit_rows)
    for part in (part for batch in batches for part in batch):
        assert len(part.pages) == -(-(part.start + len(part.token_ids)) // PAGE)
        assert part.start % PAGE == 0 or part.start in [step.start for step in steps], "cut where a page begins"


def test_what_is_cut_of_a_prompt_is_none_of_the_hosts() -> None:
    """However few tokens a part has; answers beside it keep what the host has of theirs."""
    prompt, answer = sequence(160, 16 * 60 + 5), sequence(160, 1, first_page=1000)
    steps = [replace(one, host_slots=np.arange(len(one.pages))) for one in (prompt, answer)]
    *parts, last = [part for batch in cut(steps) for part in batch]
    assert len(parts) > 1 and not any(shared_pages(part, PAGE).any() for part in parts)
    assert shared_pages(last, PAGE).sum() == 10
    tail = _part(steps[0], 16 * 60, 16 * 60 + 5, PAGE)
    assert len(tail.token_ids) < MAX_DECODE_TOKENS and not shared_pages(tail, PAGE).any()


def test_weights_are_not_read_twice_for_a_few_short_answers() -> None:
    assert len(cut([sequence(100, 1, first_page=10 * index) for index in range(8)])) == 1


def test_long_chunks_and_contexts_are_cut() -> None:
    assert 6 <= len(cut([sequence(0, 2048)])) <= 10
    assert len(cut([sequence(0, 2048)], num_stages=4)) > len(cut([sequence(0, 2048)]))
    answers = [sequence(200_000, 1, first_page=20_000 * index) for index in range(8)]
    batches = cut(answers)
    assert 2 <= len(batches) <= 8
    sizes = [len(batch) for batch in batches]
    assert max(sizes) - min(sizes) <= 1


def test_what_is_brought_for_each_part_speaks_against_parts() -> None:
    """A chunk over a prefix below the device, and answers that share one."""
    cold = 200_000 // PAGE
    assert len(cut([sequence(200_000, 512, cold=cold)])) < len(cut([sequence(200_000, 512)]))
    apart = [sequence(200_000, 1, first_page=20_000 * index, cold=cold) for index in range(8)]
    together = [replace(one, pages=np.append(apart[0].pages[:cold], one.pages[cold:])) for one in apart]
    assert len(cut(together)) == 1 < len(cut(apart))
