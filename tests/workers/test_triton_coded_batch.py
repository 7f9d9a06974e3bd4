"""Attention of whole steps over codes by the CUDA kernels: a row meets its own page as it is, and those before it as
their codes have them, wherever these lie."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.attention_steps import Sequences, Step, place, slots_for
from support.measures import TOLERANCE, relative_error
from support.prompts import seeded
from torch import Tensor

from distkv.kernels import reference
from distkv.kernels.codec_format import FORMATS, CodecFormat
from distkv.kernels.cuda.codec_pages import CudaCodec
from distkv.kernels.page_codec import decode, encode
from distkv.storage.device import CpuDevice
from distkv.storage.moving.staging_ring import StagingRing
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import DECODE_SPLIT, NUM_BUFFERS
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.tier import Tier, encode_location
from distkv.workers.attention.cuda import CudaAttention, CudaShape, plan_cuda_attention
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.host_copies import send

pytestmark = pytest.mark.interpreter
BUFFER_PAGES = DECODE_SPLIT // 16


def rounded(pages: Tensor, codec: CodecFormat) -> Tensor:
    """Pages `[..., 2, K, S, D]` with the values of their codes."""
    return decode(encode(pages, codec), codec, pages.dtype, pages.shape[-1])


def plan(steps: list[SequenceStep], s: Sequences, codec: CodecFormat, batch_invariant: bool) -> CudaAttention:
    shape = CudaShape(
        s.kv_heads * s.group, s.kv_heads, s.head_dim, s.page_size, BUFFER_PAGES, s.dtype, 2, batch_invariant,
        CudaCodec(codec, s.kv_heads, s.page_size, s.head_dim),
    )  # fmt: skip
    planned = plan_cuda_attention(steps, shape)
    return CudaAttention(planned, shape, send(planned.arrays, CpuDevice()))


def attend(step: Step, codec: CodecFormat, batch_invariant: bool, cold: set[int]) -> tuple[Tensor, Tensor]:
    """Attention of the step, and the pool behind it, with the slots in `cold` on the host instead."""
    s = step.sequences
    spec = PageSpec(1, s.kv_heads, s.page_size, s.head_dim, str(s.dtype).removeprefix("torch."), codec.name)
    host, pool = HostPool(spec, len(step.pool[0]), pinned=False), step.pool.clone()
    for slot in cold:
        host.page(slot)[0] = encode(pool[:, slot], codec)
        pool[:, slot] = 6e4
    steps = []
    for one in step.steps:
        pages = [encode_location(Tier.HOST, page) if page in cold else page for page in one.pages.tolist()]
        steps.append(SequenceStep(one.token_ids, one.start, torch.tensor(pages).numpy(), one.prompt_len, 1))
    attention = plan(steps, s, codec, batch_invariant)
    assert bool(attention.loads) == bool(cold)
    if not cold:
        return attention.attend(step.q, *step.new_kv(pool), pool, None), pool
    ring = StagingRing(spec, NUM_BUFFERS * BUFFER_PAGES, host, None, None, CpuDevice())
    stream = ring.begin(attention.loads)
    out = attention.attend(step.q, *step.new_kv(pool), pool, stream)
    stream.close()
    return out, pool


def assert_right(step: Step, out: Tensor, codec: CodecFormat) -> None:
    s, first = step.sequences, 0
    for (start, count), table in zip(s.lengths, step.tables, strict=True):
        whole = rounded(step.pool.transpose(0, 1), codec).transpose(0, 1)
        for page in range(start // s.page_size, (start + count - 1) // s.page_size + 1):
            begin, end = max(start, page * s.page_size), min(start + count, (page + 1) * s.page_size)
            seen = whole.clone()
            seen[:, table[page]] = step.pool[:, table[page]]
            rows = slice(first + begin - start, first + end - start)
            keys, values = reference.read_pages(seen, table, end)
            expected, _ = reference.attention(step.q[rows].unflatten(1, (s.kv_heads, -1)), keys, values)
            assert relative_error(out[rows], expected.flatten(1)) < TOLERANCE[s.dtype], (start, count, page)
        first += count


@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_any_step_is_right_and_the_same_wherever_its_pages_lie(data: st.DataObject) -> None:
    """Few new tokens and chunks, within a page, up to its end, and over several."""
    draw, codec = data.draw, data.draw(st.sampled_from(list(FORMATS.values())))
    page_size = draw(st.sampled_from([16, 64]))
    counts = st.one_of(st.just(1), st.integers(2, 8), st.integers(9, 3 * page_size))
    starts = st.one_of(st.integers(0, 20), st.integers(0, 300), st.just(6 * page_size - 1))
    lengths = draw(st.lists(st.tuples(starts, counts), min_size=1, max_size=3))
    sequences = Sequences(
        lengths, draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths))), page_size,
        draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([16, 64, 80])),
        draw(st.sampled_from([torch.float32, torch.float16])), draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip
    batch_invariant = draw(st.booleans())
    # what lies behind a page's tokens is as large as they are, since a page is encoded whole
    step = place(sequences, draw(slots_for(sequences.num_pages)), garbage=1.0)
    full = {
        slot for (start, _), table in zip(lengths, step.tables, strict=True) for slot in table[: start // page_size]
    }
    for slot in full:
        step.pool[:, slot] = rounded(step.pool[:, slot], codec)
    resident, pool = attend(step, codec, batch_invariant, set())
    assert_right(step, resident, codec)
    for (start, count), table in zip(lengths, step.tables, strict=True):
        for slot in table[start // page_size : (start + count) // page_size]:
            assert torch.equal(pool[:, slot], rounded(step.pool[:, slot], codec))
        if (start + count) % page_size:
            assert torch.equal(pool[:, table[-1]], step.pool[:, table[-1]])
    for cold in (full, {slot for slot in full if draw(st.booleans())}):
        there, _ = attend(step, codec, batch_invariant, cold)
        assert torch.equal(there, resident)


def test_chunks_change_no_bit() -> None:
    """With `batch_invariant`: a prompt in one chunk, and in others that end anywhere in a page."""
    sequences, codec = Sequences([(0, 90)], [0], 16, 1, 2, 64, torch.float16), FORMATS["int4"]
    whole = place(sequences, list(range(sequences.num_pages)), garbage=1.0)
    q, pool = torch.randn(90, 2, 64, generator=seeded(1)).half(), whole.pool.clone()
    attention = plan(whole.steps, sequences, codec, True)
    expected = attention.attend(q, q, q, pool, None)
    for cuts in ([7, 1, 8, 30, 2, 42], [15, 1, 1, 16, 57]):
        pool, start, found = whole.pool.clone(), 0, []
        for count in cuts:
            pages = torch.tensor(whole.tables[0][: -(-(start + count) // 16)]).numpy()
            one = plan([SequenceStep([7] * count, start, pages, 90, 1)], sequences, codec, True)
            rows = q[start : start + count]
            found.append(one.attend(rows, rows, rows, pool, None))
            start += count
        assert start == 90 and torch.equal(torch.cat(found), expected), cuts
