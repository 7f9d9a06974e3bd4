"""The Triton kernels on a CUDA device, in bf16 too, against their float64 definitions. Run with `pytest -m gpu`."""

from dataclasses import replace

import pytest
import torch
from support.attention_steps import Sequences, place
from support.coded_pages import bits, some_pages
from support.measures import TOLERANCE, relative_error
from support.prompts import seeded
from torch import Tensor

from distkv.kernels import reference
from distkv.kernels.codec_format import FORMATS, CodecFormat
from distkv.kernels.page_codec import decode, encode
from distkv.storage.device import device_of
from distkv.storage.paging import pages_for
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.host_copies import send

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))


def attend(sequences: Sequences, slots: list[int], num_programs: int, garbage: float = 6e4) -> Tensor:
    """Attention of a step with its pages in the given slots, compared with its definition."""
    from distkv.workers.attention.cuda import CudaAttention, CudaShape, plan_cuda_attention  # imports triton

    def plan(steps: list[SequenceStep], s: Sequences) -> CudaAttention:
        shape = CudaShape(s.kv_heads * s.group, s.kv_heads, s.head_dim, s.page_size, 64, s.dtype, num_programs)
        planned = plan_cuda_attention(steps, shape)
        return CudaAttention(planned, shape, send(planned.arrays, device_of(CUDA)))

    step = place(sequences, slots, garbage)
    step = replace(step, pool=step.pool.to(CUDA), q=step.q.to(CUDA))
    step.assert_right(plan)
    return step.attend(plan)


@pytest.mark.parametrize(
    "dtype, head_dim, page_size, group",
    [
        (torch.bfloat16, 64, 16, 3),
        (torch.bfloat16, 80, 256, 1),
        (torch.bfloat16, 96, 64, 2),
        (torch.bfloat16, 128, 16, 16),
        (torch.bfloat16, 128, 256, 4),
        (torch.bfloat16, 128, 512, 8),
        (torch.float16, 80, 32, 1),
        (torch.float16, 128, 256, 4),
        (torch.float32, 64, 256, 3),
        (torch.float32, 128, 16, 4),
    ],
)
def test_attention_of_mixed_steps(dtype: torch.dtype, head_dim: int, page_size: int, group: int) -> None:
    """Decodes, a few tokens and chunks of prompts; bitwise the same in other slots and with other programs."""
    lengths = [(3000, 1), (0, 1), (777, 1), (1500, 8), (15, 8), (2100, 300), (0, 200), (129, 9)]
    sequences = Sequences(lengths, [0] * len(lengths), page_size, 2, group, head_dim, dtype)
    slots = list(range(sequences.num_pages))
    once = attend(sequences, slots, num_programs=7)
    again = attend(sequences, slots[::-1], num_programs=200, garbage=-6e4)
    assert torch.equal(once, again)


@dtypes
def test_decode_over_many_states(dtype: torch.dtype) -> None:
    sequences = Sequences([(40_000, 1), (70, 1)], [0, 0], 16, 2, 4, 128, dtype)
    assert sequences.num_pages == pages_for(40_001, 16) + pages_for(71, 16)
    attend(sequences, list(range(sequences.num_pages)), num_programs=64)


@dtypes
@pytest.mark.parametrize("codec", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("page_size, head_dim", [(16, 64), (256, 128), (64, 96)])
def test_codes(dtype: torch.dtype, codec: CodecFormat, page_size: int, head_dim: int) -> None:
    """Pages to pinned memory and back, and rounded where they lie, bit for bit as on a CPU."""
    from distkv.kernels.cuda.codec_pages import CudaCodec  # imports triton

    pages = some_pages(head_dim, dtype, page_size, head_dim, 3, 4, size=0.01)  # [layer, slot, 2, head, ...]
    codes = encode(pages, codec)
    rounded = decode(codes, codec, dtype, head_dim)
    kernels, pool = CudaCodec(codec, 2, page_size, head_dim), pages.transpose(1, 2).contiguous().to(CUDA)
    host = torch.zeros_like(codes.transpose(0, 1).contiguous()).pin_memory()
    of_host, of_device = host.flatten(1, 2).flatten(2), pool.flatten(0, 1).flatten(2).transpose(0, 1)
    kernels.encode_rows(of_device, of_host, torch.tensor([[0, 3], [2, 1]], device=CUDA), 16)
    kernels.decode_rows(of_host, of_device, torch.tensor([[1, 3]], device=CUDA), 16)
    layer, exact = pool[1].clone(), torch.empty(2, *pages.shape[2:], dtype=dtype, device=CUDA)
    kernels.round(layer, torch.tensor([1, -1], device=CUDA), exact)
    torch.cuda.synchronize()
    found = decode(host.transpose(0, 1), codec, dtype, head_dim)
    assert torch.equal(bits(found[:, 3]), bits(rounded[:, 0])) and torch.equal(bits(found[:, 1]), bits(rounded[:, 2]))
    assert torch.equal(bits(pool[:, :, 3].cpu()), bits(rounded[:, 2]))
    assert torch.equal(exact[0].cpu(), pages[1, 1]) and torch.equal(bits(layer[:, 1].cpu()), bits(rounded[1, 1]))


@dtypes
@pytest.mark.parametrize("hidden", [576, 4096, 8192])
def test_rms_norm_and_swiglu(dtype: torch.dtype, hidden: int) -> None:
    from distkv.kernels.cuda.activation import swiglu  # imports triton
    from distkv.kernels.cuda.norm import rms_norm

    generator = seeded(hidden)
    x, delta = torch.randn(2, 37, hidden, generator=generator).to(CUDA, dtype)
    weight = torch.randn(hidden, generator=generator).to(CUDA, dtype)
    total = x + delta
    normed = rms_norm(x, weight, 1e-5, delta)
    assert torch.equal(x, total)
    assert relative_error(normed, reference.rms_norm(total, weight, 1e-5)) < TOLERANCE[dtype]
    gate_up = torch.randn(37, 2 * hidden, generator=generator).to(CUDA, dtype)
    assert relative_error(swiglu(gate_up), reference.swiglu(gate_up)) < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_rope_and_write_kv(dtype: torch.dtype, head_dim: int) -> None:
    from distkv.kernels.cuda.rope import rope_and_write_kv  # imports triton

    generator, heads, kv_heads, page_size = seeded(head_dim), 8, 2, 16
    qkv = torch.randn(21, heads + 2 * kv_heads, head_dim, generator=generator).to(CUDA, dtype)
    angle = torch.randn(21, 1, head_dim // 2, generator=generator).to(CUDA)
    before = torch.randn(2, 5, kv_heads, page_size, head_dim, generator=generator).to(CUDA, dtype)
    pool, original = before.clone(), qkv.clone()
    place_T = torch.randperm(5 * page_size, generator=generator)[:21].to(CUDA)
    page, offset = place_T // page_size, place_T % page_size
    page[-1] = -1  # padding
    q, k, v = rope_and_write_kv(qkv, angle.cos(), angle.sin(), pool, page, offset)
    rotated = reference.rotate(original[:, : heads + kv_heads], angle.cos(), angle.sin())
    assert relative_error(torch.cat([q, k], 1), rotated) < TOLERANCE[dtype]
    assert torch.equal(v, original[:, -kv_heads:])
    for part, values in enumerate((k, v)):
        before[part, page[:-1], :, offset[:-1]] = values[:-1]
    assert torch.equal(pool, before)
