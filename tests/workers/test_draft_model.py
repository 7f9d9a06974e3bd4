"""A draft model says what it would go on with by itself, whatever it has read before, and keeps within its cache."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.prompts import random_prompt
from support.ranks import load_rank, rank_config, run_chunks
from support.sample_rows import GREEDY

from distkv.storage.paging import pages_for
from distkv.workers.backend import make_backend
from distkv.workers.drafting.draft_contexts import DraftContexts
from distkv.workers.drafting.draft_model import DraftModel
from distkv.workers.drafting.draft_request import DraftRequest
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank_config import DraftConfig

PAGE = 16


def load(folder: Path, num_pages: int = 32, **options: Any) -> DraftModel:
    draft = DraftConfig(folder, ModelConfig.load(folder), num_pages)
    return DraftModel(rank_config(folder, draft=draft, page_size=PAGE, **options), make_backend("cpu"))


def request(number: int, token_ids: list[int], count: int) -> DraftRequest:
    return DraftRequest(number, token_ids, len(token_ids), [GREEDY] * count)


def goes_on(folder: Path, token_ids: list[int], count: int) -> list[int]:
    """What the model adds, each token by the whole of what is before."""
    rank, tokens = load_rank(folder), list(token_ids)
    for _ in range(count):
        tokens.append(int(run_chunks(rank, tokens, [len(tokens)], wanted=1)[-1].argmax()))
    return tokens[len(token_ids) :]


def test_drafts_are_what_the_model_goes_on_with(tiny_model: Path) -> None:
    """Several at a time, of any length, and again behind answers that took some of a draft and not all."""
    model, rng = load(tiny_model), Random(1)
    answers = {number: random_prompt(length, length) for number, length in enumerate((1, 15, 16, 40))}
    for _ in range(4):
        counts = {number: rng.randint(1, 8) for number in answers}
        found = model.draft([request(number, list(own), counts[number]) for number, own in answers.items()])
        for (number, own), draft in zip(answers.items(), found, strict=True):
            assert draft == goes_on(tiny_model, own, counts[number])
            own += [*draft[: rng.randint(0, len(draft))], rng.randrange(100)]
    model.close()


def test_a_long_context_is_read_bit_by_bit(tiny_model: Path) -> None:
    model = load(tiny_model, max_num_batched_tokens=64)
    long, short = random_prompt(150, 1), random_prompt(10, 2)
    assert model.draft([request(1, long, 4)]) == [[]]
    assert model.draft([request(1, long, 4), request(2, short, 4)]) == [[], []], "the first has taken all of it"
    found = model.draft([request(1, long, 4), request(2, short, 4)])
    assert found == [goes_on(tiny_model, long, 4), goes_on(tiny_model, short, 4)]
    model.close()


def test_who_drafted_last_has_the_pages(tiny_model: Path) -> None:
    model = load(tiny_model, num_pages=5)
    first, second = random_prompt(40, 1), random_prompt(30, 2)
    assert model.draft([request(1, first, 3)]) == [goes_on(tiny_model, first, 3)]
    assert model.draft([request(2, second, 3)]) == [goes_on(tiny_model, second, 3)], "the first has made room"
    both = model.draft([request(1, first, 3), request(2, second, 3)])
    assert both == [[], goes_on(tiny_model, second, 3)], "who is there in the same step stays"
    assert model.draft([request(3, random_prompt(78, 3), 3)]) == [[]], "there never is"
    assert model.draft([request(1, first, 3)]) == [goes_on(tiny_model, first, 3)]
    model.close()


@pytest.mark.parametrize("seed", range(5))
def test_pages_are_shared_out(seed: int) -> None:
    """Nobody has a page of another one, and none is lost."""
    rng, contexts, held = Random(seed), DraftContexts(20, PAGE), dict[int, list[int]]()
    for _ in range(300):
        number, num_tokens = rng.randrange(6), rng.randint(1, 400)
        if rng.random() < 0.2:
            contexts.forget([number])
        keeps = set(rng.sample(range(6), 2))
        before = {one: list(contexts.of(one).slots) for one in keeps}
        grown = contexts.grow(number, num_tokens, keeps)
        for one in keeps - {number}:
            assert contexts.of(one).slots == before[one]
        own = contexts.of(number).slots
        assert (grown is None) == (not own) and (grown is None or len(own) >= pages_for(num_tokens, PAGE))
        held = {one: contexts.of(one).slots for one in range(6)}
        slots = [slot for one in held.values() for slot in one]
        assert len(slots) == len(set(slots)) and len(slots) + len(contexts._free) == 20
