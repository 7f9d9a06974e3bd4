"""Attention over pages that several ranks share out: bit for bit that of one rank that has all of them.

The ranks are threads here.
"""

import pytest
import torch
from support.attention_steps import BUFFER_PAGES, Sequences, place
from support.context_ranks import Heads, RankMemory, attend_on_ranks, by_pages_of_ranks, slots_full_before

from distkv.kernels.codec_format import FORMATS
from distkv.kernels.native.codec_pages import NativeCodec
from distkv.kernels.native.library import load_best
from distkv.workers.attention import context_attention
from distkv.workers.attention.context_attention import ContextGroup, plan_context_attention
from distkv.workers.attention.native import plan_native_attention
from distkv.workers.backends.cpu import CpuBackend
from distkv.workers.errors import ConfigError
from distkv.workers.group.process_group import ProcessGroup
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import Attention

PAGE_SIZE = 16  # of a rank


HEADS = {
    "2 ranks of 1 KV head": Heads(1, 3, [(0, 2), (2, 3)], [(0, 1), (0, 1)]),
    "2 ranks of 3 KV heads": Heads(3, 3, [(0, 6), (6, 9)], [(0, 2), (2, 3)]),
    "3 ranks of 1 KV head": Heads(1, 4, [(0, 2), (2, 3), (3, 4)], [(0, 1), (0, 1), (0, 1)]),
}
# tokens before the step and in it: prompts that begin, go on and end anywhere in a page, and answers
LENGTHS = [
    [(0, 100), (130, 1), (64, 33), (200, 7)],
    [(31, 1), (32, 1), (47, 8), (500, 2)],
    [(250, 60), (250, 1), (96, 300)],
]


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of a few pages, so that there are many of them."""
    monkeypatch.setattr(context_attention, "STATE_BYTES", 12000)
    monkeypatch.setattr(context_attention, "PAGE_BYTES", 40000)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))
@pytest.mark.parametrize("codec", ["auto", "int8"])
def test_ranks_that_share_out_pages_change_no_bit(heads: Heads, lengths: list[tuple[int, int]], codec: str) -> None:
    sequences = Sequences(
        lengths,
        [0, 2, 2, 1],
        PAGE_SIZE * heads.size,
        heads.kv_heads,
        heads.group,
        32,
        torch.bfloat16,
        seed=len(lengths),
    )
    slots = torch.randperm(sequences.num_pages + 3).tolist()[: sequences.num_pages]
    step = place(sequences, slots, garbage=100.0)
    one = by_pages_of_ranks(step, heads.size)
    library, pool, native = load_best(), one.pool, None
    if codec != "auto":
        native = NativeCodec(library, FORMATS[codec])
        native.round(pool, torch.tensor(sorted(slots_full_before(one.steps, PAGE_SIZE))))
    whole = pool.clone()
    expected = plan_native_attention(library, one.steps, PAGE_SIZE, BUFFER_PAGES, native).attend(
        one.q, one.q, one.q, pool, None
    )

    def plan(steps: list[SequenceStep], rank: RankMemory) -> Attention:
        return plan_context_attention(library, steps, rank.spec, rank.context, rank.ring.buffer_pages, native)

    full = slots_full_before(step.steps, sequences.page_size)
    for cold in set(), full, {slot for slot in full if slot % 3}:
        assert torch.equal(attend_on_ranks(step, whole, heads, cold, codec, native, BUFFER_PAGES, plan), expected)


def test_kernels_that_cannot_are_refused() -> None:
    with pytest.raises(ConfigError, match="native kernels of a CPU and those of CUDA"):
        CpuBackend().use_context_group(ContextGroup(ProcessGroup(), [(0, 1)], [(0, 1)]))
