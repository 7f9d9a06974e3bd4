"""The sweep of `.ci/gpu` over attention in Triton's interpreter, and that the parts of decode that it measures do what
their names say."""

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)

from contextlib import nullcontext
from dataclasses import replace

import decode_parts
import sweep
import torch
from decode_parts import merge_alone, read_pages, splits_alone
from support.meters import FakeMeter, fake_turns

from distkv.bench.kernel_attention import random_pool, resident
from distkv.bench.kernel_work import AttentionShape
from distkv.kernels.cuda.softmax import States
from distkv.workers.attention import cuda
from distkv.workers.attention.cuda import new_states
from distkv.workers.page_directory import SequenceStep

pytestmark = pytest.mark.interpreter

SHAPE = AttentionShape(query_heads=4, kv_heads=2, head_dim=16, page_size=128, dtype=torch.float32)


@pytest.mark.parametrize("num_programs", [1, 3, 7])
def test_each_program_reads_its_pages_whole(num_programs: int) -> None:
    """Two tiles a page; the table leaves out one page of eight, whose numbers are larger than all others."""
    pool, table = random_pool(replace(SHAPE, dtype=torch.bfloat16), 8, torch.device("cpu"))
    table = table[:7]
    left_out = ({*range(8)} - {*table.tolist()}).pop()
    pool[:, left_out] = 1000
    out = read_pages(pool, table, num_programs)
    mine = [pool[:, table[program::num_programs]].float().amax((0, 1, 3, 4)) for program in range(num_programs)]
    assert torch.equal(out, torch.stack(mine, 1))
    page = int(table[4])
    for part, head, token, dim in ((0, 0, 0, 0), (0, 1, 127, 15), (1, 0, 63, 7), (1, 1, 64, 8), (1, 1, 127, 15)):
        before = pool[part, page, head, token, dim].clone()
        pool[part, page, head, token, dim] = 500
        assert (read_pages(pool, table, num_programs) == 500).nonzero().tolist() == [[head, 4 % num_programs]]
        pool[part, page, head, token, dim] = before


@pytest.mark.parametrize("in_rounds", [False, True])
def test_splits_and_merge_make_a_step_together(in_rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distkv.workers.attention.decode_plan.DECODE_SPLIT", 128)
    if in_rounds:  # of one tile of states
        monkeypatch.setattr(cuda, "STATE_BYTES", 1)
    pool, table = random_pool(SHAPE, 20, torch.device("cpu"))
    step = SequenceStep([0], 20 * 128 - 1, table.numpy(), 20 * 128, 1)
    attention = resident(SHAPE, [step], fake_turns())
    assert len(attention.plan.decode[0].rounds) == 1 + in_rounds
    q = torch.randn(1, 4, 16).to(SHAPE.dtype)
    whole = attention.attend(q, q, q, pool, None).view_as(q)
    computed: list[States] = []
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "new_states", lambda *size: computed.append(new_states(*size)) or computed[-1])
        patch.setattr(cuda, "merge_splits", splits_alone)
        attention.attend(q, q, q, pool, None)
    assert [len(states.acc) for states in computed] == ([16, 4] if in_rounds else [20])
    monkeypatch.setattr(decode_parts, "new_states", lambda *size: computed.pop(0))
    assert torch.equal(merge_alone(attention, q), whole) and not computed


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(sweep, "SHAPE", replace(SHAPE, page_size=64))
    monkeypatch.setattr(sweep, "COMPILED_TOKENS", 128)
    monkeypatch.setattr(sweep, "programs", min)
    monkeypatch.setattr(sweep, "median", lambda meter, work, repeats: meter.seconds(work))


@pytest.mark.usefixtures("on_a_cpu")
def test_rows_of_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock on which everything takes a millisecond; a variant that is wrong or fails costs no other one."""
    tile, wide = sweep.tile(32, 4, 3), sweep.tile(64, 8, 2)
    variants = [sweep.Variant(256, 3, tile), sweep.Variant(512, 2, wide | {"maxnreg": 96})]
    monkeypatch.setattr(sweep, "DECODE_VARIANTS", variants)
    monkeypatch.setattr(sweep, "PREFILL_VARIANTS", [sweep.Variant(options=tile), sweep.Variant(options=wide)])
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "suppress", lambda kind: nullcontext())
        sweep.compile_share(0, 1)
    variants.insert(1, sweep.Variant(256, 4, {"BLOCK_N": 33}))
    first, failed, last = sweep.decode_row(FakeMeter(), 2, 512).items()
    figure = {"GB/s": round(2 * 512 * 2 * 2 * 16 * 4 / 1e6, 2), "us": 1000.0}
    assert first == ("split 256, 3 programs, BLOCK_N 32, num_warps 4, num_stages 3", figure)
    assert last == ("split 512, 2 programs, BLOCK_N 64, num_warps 8, num_stages 2, maxnreg 96", figure)
    assert failed[0] == "split 256, 4 programs, BLOCK_N 33" and isinstance(failed[1], str)
    found = sweep.prefill_row(FakeMeter(), 128)
    assert [row["us"] for row in found.values()] == [1000.0, 1000.0]

    monkeypatch.setattr(sweep, "merge_alone", lambda *arguments: 1 / 0)
    parts = sweep.decode_parts(FakeMeter(), 2, 512)
    assert parts.pop("merge alone") == "ZeroDivisionError: division by zero"
    assert list(parts) == [
        "splits and merge", "splits alone", "pages in one piece",
        *(f"pages through the table, {count} programs" for count in sweep.READERS),
    ] and set(parts.values()) == {1000.0}  # fmt: skip


@pytest.mark.usefixtures("on_a_cpu")
def test_a_variant_that_computes_something_else_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    merges = iter([cuda.merge_splits])  # then it is left out
    monkeypatch.setattr(sweep, "DECODE_VARIANTS", [sweep.Variant(), sweep.Variant(512)])
    monkeypatch.setattr(
        cuda, "merge_splits", lambda *arguments, **options: next(merges, splits_alone)(*arguments, **options)
    )
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    right, wrong = sweep.decode_row(FakeMeter(), 1, 512).values()
    assert "us" in right and "split 512" in wrong and "differs" in wrong
