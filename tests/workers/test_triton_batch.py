"""Attention of whole steps by the CUDA kernels: mixed steps over scattered, shared, half-filled and cold pages."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.attention_steps import Sequences, place, slots_for
from torch import Tensor

from distkv.storage.device import CpuDevice
from distkv.storage.paging import DECODE_SPLIT
from distkv.workers.attention import cuda as cuda_attention
from distkv.workers.attention import decode_plan
from distkv.workers.attention.cuda import CudaAttention, CudaShape, plan_cuda_attention
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.host_copies import send
from distkv.workers.sizes import STATE_BYTES

pytestmark = pytest.mark.interpreter
BUFFER_PAGES = DECODE_SPLIT // 16
few = settings(max_examples=4, suppress_health_check=[HealthCheck.too_slow], deadline=None)


def plan_on_cuda(steps: list[SequenceStep], s: Sequences, batch_invariant: bool = False) -> CudaAttention:
    heads = s.kv_heads * s.group
    shape = CudaShape(heads, s.kv_heads, s.head_dim, s.page_size, BUFFER_PAGES, s.dtype, 2, batch_invariant)
    plan = plan_cuda_attention(steps, shape)
    return CudaAttention(plan, shape, send(plan.arrays, CpuDevice()))


@st.composite
def any_sequences(draw: st.DrawFn) -> Sequences:
    counts = st.one_of(st.just(1), st.integers(1, 8), st.integers(9, 40))
    starts = st.one_of(st.integers(0, 20), st.integers(0, 600))
    lengths = draw(st.lists(st.tuples(starts, counts), min_size=1, max_size=4))
    return Sequences(
        lengths=lengths,
        shared=draw(st.lists(st.integers(0, 20), min_size=len(lengths), max_size=len(lengths))),
        page_size=draw(st.sampled_from([16, 64, 256])),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([16, 64, 80])),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def full_pages(sequences: Sequences) -> list[int]:
    """Those that no token of the step is written to."""
    tables = zip(sequences.lengths, sequences.pages, strict=True)
    return sorted({page for (start, _), pages in tables for page in pages[: start // sequences.page_size]})


@few
@given(st.data())
def test_any_step_is_right_and_the_same_wherever_its_pages_lie(data: st.DataObject) -> None:
    sequences = data.draw(any_sequences())
    step = place(sequences, data.draw(slots_for(sequences.num_pages)))
    plan = partial(plan_on_cuda, batch_invariant=data.draw(st.booleans()))
    step.assert_right(plan)
    resident = step.attend(plan)
    elsewhere = place(sequences, list(range(sequences.num_pages)), garbage=-6e4)
    assert torch.equal(elsewhere.attend(plan), resident)
    full = full_pages(sequences)
    for cold in (set(full), {page for page in full if data.draw(st.booleans())}):
        assert torch.equal(step.attend_with_cold(cold, plan), resident)


@pytest.mark.parametrize("state_bytes", [1, STATE_BYTES], ids=["rounds", "at once"])
def test_a_long_context_in_rounds(monkeypatch: pytest.MonkeyPatch, state_bytes: int) -> None:
    """However many states are held at a time, and with pages in a mix of places: bitwise one result."""
    sequences = Sequences([(16 * 70 + 3, 1), (40, 1)], [0, 0], head_dim=16, kv_heads=1)
    monkeypatch.setattr(decode_plan, "DECODE_SPLIT", 16)  # so that it need not be so long for the interpreter
    step = place(sequences, list(range(sequences.num_pages))[::-1])
    expected = step.attend(plan_on_cuda)
    step.assert_right(plan_on_cuda)
    monkeypatch.setattr(cuda_attention, "STATE_BYTES", state_bytes)
    rounds = plan_on_cuda(step.steps, sequences).plan.decode[0].rounds
    assert [one.num_states for one in rounds] == ([16, 16, 16, 16, 10] if state_bytes == 1 else [74])
    assert torch.equal(step.attend(plan_on_cuda), expected)
    cold = set(full_pages(sequences)[::3])
    assert torch.equal(step.attend_with_cold(cold, plan_on_cuda), expected)


def test_answers_and_chunks_over_one_prefix_take_each_load_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether states of all splits are held at a time, or two answers go through their rounds side by side: bitwise one
    result, for which each cold page is brought once."""
    sequences = Sequences([(643, 1), (643, 1), (640, 12), (650, 3)], [0, 40, 40, 40], head_dim=16, kv_heads=1)
    monkeypatch.setattr(decode_plan, "DECODE_SPLIT", 16)
    step = place(sequences, list(range(sequences.num_pages))[::-1])
    expected = step.attend(plan_on_cuda)
    monkeypatch.setattr(cuda_attention, "STATE_BYTES", 2 * 32 * 2 * (16 + 2) * 4)
    assert torch.equal(step.attend(plan_on_cuda), expected)
    cold = set(full_pages(sequences)[1:])

    def planned(steps: list[SequenceStep], s: Sequences) -> CudaAttention:
        attention = plan_on_cuda(steps, s)
        assert len(attention.plan.decode[0].rounds) == 3 and sum(map(len, attention.loads)) == len(cold)
        return attention

    assert torch.equal(step.attend_with_cold(cold, planned), expected)


def test_padding_rows_come_out_as_zeros() -> None:
    sequences = Sequences([(70, 1), (33, 1)], [0, 0], head_dim=64)
    step = place(sequences, list(range(sequences.num_pages)))
    shape = CudaShape(4, 2, 64, 16, BUFFER_PAGES, torch.float32, num_programs=2)
    plan = plan_cuda_attention(step.steps, shape, num_padding=2)
    attention = CudaAttention(plan, shape, send(plan.arrays, CpuDevice()))
    q = torch.cat([step.q, torch.full_like(step.q, 3.0)])
    out: Tensor = attention.attend(q, q, q, step.pool, None)
    assert torch.equal(out[:2], step.attend(plan_on_cuda))
    assert torch.equal(out[2:], torch.zeros_like(out[2:]))
