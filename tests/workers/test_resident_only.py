"""Tokens that attend to pages on the device alone, against transformers with the other ones masked."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import save_llama
from support.measures import largest_error
from support.plans import sequence_step, step_plan
from support.ranks import load_rank
from transformers import LlamaForCausalLM

from distkv.storage.tier import HOST, encode_location

PAGE_SIZE = 16
COLD = (1, 2, 4)  # pages
TOLERANCE = 1e-4  # of the largest logit


@torch.inference_mode()
def expected(folder: Path, tokens: list[int], start: int) -> torch.Tensor:
    """Logits of the tokens from `start` on, which do not see those of cold pages; those before see everything."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache = model(torch.tensor([tokens[:start]]), use_cache=True).past_key_values
    mask = torch.ones(1, len(tokens), dtype=torch.int64)
    for page in COLD:
        mask[:, page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = 0
    new, positions = torch.tensor([tokens[start:]]), torch.arange(start, len(tokens))[None]
    return model(new, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[0]


@pytest.mark.parametrize("count", [1, 5, 12])
def test_cold_pages_are_left_out_and_positions_stay(tmp_path: Path, count: int) -> None:
    """In tokens that go over the end of a page, beside another sequence."""
    folder, _ = save_llama(tmp_path)
    start = 7 * PAGE_SIZE - 3
    tokens = torch.randint(128, (start + count,), generator=torch.Generator().manual_seed(1)).tolist()
    rank = load_rank(folder)
    pages = list(range(3, 12))
    rank.execute(step_plan([sequence_step(tokens[:start], 0, pages[:7], start, 1)]))
    other = sequence_step([5, 6, 7], 0, [0], 3, 1)
    new = sequence_step(tokens[start:], start, pages[: -(-len(tokens) // PAGE_SIZE)], start, count)
    for page in COLD:
        new.pages[page] = encode_location(HOST, page)
    plan = step_plan([other, new])
    plan.sequences[1].resident_only = True
    logits = rank.execute(plan)
    assert logits is not None
    assert largest_error(logits[1:], expected(folder, tokens, start)) < TOLERANCE
