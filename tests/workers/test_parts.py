"""Fewer ranks that take the parts of more in all sums: logits are the same bit for bit."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import save_llama
from support.plans import sequence_step, step_plan
from support.prompts import random_prompt
from support.ranks import rank_config
from torch import Tensor

from distkv.workers.group.communicators import Communicators
from distkv.workers.group.process_group import ProcessGroup, open_store
from distkv.workers.group.shared_memory import SharedMemory
from distkv.workers.model.layout import Layout
from distkv.workers.rank import Rank
from distkv.workers.sizes import PoolSizes


def on_ranks(size: int, run: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def logits(folder: Path, size: int, num_parts: int | None, dtype: str, prompt_len: int = 40, **more: Any) -> Tensor:
    """Of all tokens of a prompt that is read in two steps."""
    config = rank_config(folder, dtype=dtype, num_threads=1, layout=Layout(size, num_parts=num_parts), **more)
    store = open_store("127.0.0.1")
    prompt = random_prompt(40, 1)

    def run(number: int) -> Tensor | None:
        shared = SharedMemory.join(open_store("127.0.0.1", store.port), number, size) if size > 1 else None
        rank = Rank(config, Communicators(number, ProcessGroup(number, size, shared=shared)))
        rank.allocate(PoolSizes(device=8, summaries=8))
        steps = [
            sequence_step(prompt[:23], 0, [3, 1], prompt_len, 23),
            sequence_step(prompt[23:], 23, [3, 1, 6], prompt_len, 17),
        ]
        found = [rank.execute(step_plan([step])) for step in steps]
        return torch.cat(found) if number == 0 else None  # type: ignore[arg-type]

    return on_ranks(size, run)[0]


@pytest.mark.parametrize("name", ["top_pages(pages=2)", "decay(pages=2)"])
def test_ranks_choose_pages_for_their_own_heads(tmp_path: Path, name: str) -> None:
    """Where that is all of them, logits are those of full attention, which other choices change; one rank chooses for
    all heads as two do."""
    folder, _ = save_llama(tmp_path, num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    full, all_pages, some = (
        logits(folder, 2, None, "bfloat16", prompt_len=10, attention_policy=policy)
        for policy in ("full", name.replace("pages=2", "share=1"), name)
    )
    assert torch.equal(all_pages, full)
    assert torch.equal(some[:32], full[:32]) and not torch.equal(some, full), "they have two pages in any case"
    assert torch.equal(logits(folder, 1, 2, "bfloat16", prompt_len=10, attention_policy=name), some)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kv_heads, num_parts, sizes", [(3, 3, (2, 1)), (2, 3, (2, 1)), (4, 2, (1,))])
def test_fewer_ranks_change_no_bit(
    tmp_path: Path, kv_heads: int, num_parts: int, sizes: tuple[int, ...], dtype: str
) -> None:
    """With 2 KV heads on 3 ranks two of them hold one head, and share out its query heads. Nothing is even."""
    heads = 12
    folder, _ = save_llama(
        tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=16 * heads,
        intermediate_size=113, vocab_size=130, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    expected = logits(folder, num_parts, None, dtype)
    for size in sizes:
        assert torch.equal(logits(folder, size, num_parts, dtype), expected), size
        assert not torch.equal(logits(folder, size, None, dtype), expected), "what the parts are for"
