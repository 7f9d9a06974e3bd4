"""The single-rank path on a CUDA device. Run with `pytest -m gpu`; needs neither ray nor zarr."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read_prefix, relative_error, save_llama, seeded
from test_residency import run
from torch import Tensor

from distkv import LLM, SamplingParams
from distkv.kernels import reference
from distkv.kernels.attention import attend, prefill_attention
from distkv.storage.device_pool import DevicePool
from distkv.storage.host_pool import HostPool
from distkv.storage.mover import Mover
from distkv.storage.page_copies import PageCopies
from distkv.storage.page_size import NUM_BUFFERS
from distkv.storage.page_spec import PageSpec
from distkv.storage.staging_ring import StagingRing
from distkv.storage.streams import CudaStreams, Lane
from distkv.storage.tier import Tier, Transfer, location

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_prefill_attention_matches_the_reference(dtype: torch.dtype, limit: float, head_dim: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = seeded(1)
    page_size, prefix, chunk, kv_heads, group = 64, 200, 96, 2, 4
    pool = torch.randn(2, 8, kv_heads, page_size, head_dim, generator=generator).to("cuda", dtype)
    q = torch.randn(chunk, kv_heads, group, head_dim, generator=generator).to("cuda", dtype)
    k, v = torch.randn(2, chunk, kv_heads, head_dim, generator=generator).to("cuda", dtype)
    pages = [5, 0, 7, 2]
    out, _ = prefill_attention(q, k, v, read_prefix(pool, np.array(pages), prefix))
    old_k, old_v = reference.read_pages(pool, pages, prefix)
    expected, _ = reference.attention(q, torch.cat([old_k, k]), torch.cat([old_v, v]))
    assert relative_error(out, expected) < limit


def test_causal_attend_returns_the_log_sum_exp() -> None:
    q, k, v = torch.randn(3, 2, 3, 40, 64, generator=seeded(2)).cuda()
    out, lse = attend(q, k, v, causal=True)
    for n in range(2):
        expected, expected_lse = reference.attention(
            q[n].permute(1, 0, 2)[:, :, None], k[n].transpose(0, 1), v[n].transpose(0, 1)
        )
        assert relative_error(out[n].permute(1, 0, 2)[:, :, None], expected) < 1e-5
        assert relative_error(lse[n].t()[..., None], expected_lse) < 1e-5


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_greedy_tokens_equal_those_of_transformers(tmp_path: Path, heads: int, kv_heads: int) -> None:
    folder, peer = save_llama(tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads)
    prompts = [torch.randint(3, 128, (n,), generator=seeded(n)).tolist() for n in (1, 5, 70, 150)]
    with LLM(folder, device="cuda", page_size=16, max_num_batched_tokens=64, device_kv_bytes="8MiB") as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    peer = peer.cuda()
    for prompt, output in zip(prompts, outputs, strict=True):
        generated = peer.generate(
            torch.tensor([prompt], device="cuda"), max_new_tokens=48, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert output.outputs[0].token_ids == generated[0, len(prompt) :].tolist()


def test_the_device_pool_is_sized_by_gpu_memory_utilization(tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path, max_position_embeddings=1 << 20)
    before = torch.cuda.mem_get_info()[0]
    total = torch.cuda.mem_get_info()[1]
    with LLM(folder, device="cuda", gpu_memory_utilization=0.5, max_num_seqs=256, dtype="bfloat16") as llm:
        assert llm.info.pool_bytes <= 0.5 * total
        assert llm.info.pool_bytes > 0.5 * total - (total - before) - 4 * 2**30
        assert llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("gain", [0.0, float("inf")], ids=["gather kernel", "copy engine"])
def test_tiers_change_no_bit_and_memory_stays_flat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float
) -> None:
    """Decode and prefill over a host tier, and the device memory of contexts that differ fourfold."""
    monkeypatch.setattr("distkv.workers.bandwidth.KERNEL_GAIN", gain)
    torch.backends.cuda.matmul.allow_tf32 = False
    folder, _ = save_llama(
        tmp_path / "model", num_attention_heads=8, num_key_value_heads=2, hidden_size=512, max_position_embeddings=65536
    )
    options = {"page_size": 64, "max_num_batched_tokens": 512, "max_num_seqs": 1}
    peaks = []
    for length in (4000, 16000):
        prompt = torch.randint(3, 128, (length,), generator=seeded(length)).tolist()
        resident = run(folder, [prompt], pages=(length // 64 + 2, 0, 0), **options)
        torch.cuda.reset_peak_memory_stats()
        tiered = run(folder, [prompt], pages=(12, length // 64 + 2, 0), **options)
        peaks.append(torch.cuda.max_memory_allocated())
        tiered.assert_same(resident)
        assert tiered.moved("host_streamed") > 20 * (length // 64 - 12) * tiered.page_bytes
    assert peaks[1] - peaks[0] < 4 * 2**20, peaks


# --- streams ---

SPEC = PageSpec(num_layers=4, num_kv_heads=2, page_size=64, head_dim=64, dtype=torch.bfloat16)
SLEEP = 20_000_000  # cycles, some 10 ms: what is enqueued behind them has not begun when the host goes on


def page_of(value: int) -> Tensor:
    """A page whose bits tell its number and the place in it."""
    places = torch.arange(SPEC.page_bytes // 2, dtype=torch.int32).view(SPEC.page_shape)
    return (places * 31 + value * 1009).to(torch.int16).view(torch.bfloat16)


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.cpu().contiguous().view(torch.int16), y.cpu().contiguous().view(torch.int16))


@pytest.fixture(params=["copy engine", "gather kernel"])
def copies(request: pytest.FixtureRequest) -> PageCopies:
    from distkv.kernels.cuda.page_copy import copy_pages

    made = PageCopies(CudaStreams(torch.device("cuda")))
    if request.param == "gather kernel":
        made.kernels = {lane: copy_pages for lane in (Lane.LOAD, Lane.FETCH, Lane.SPILL)}
    return made


@pytest.fixture
def pinned() -> Iterator[HostPool]:
    pool = HostPool(SPEC, 8, pinned=True)
    for slot in range(8):
        pool.store(slot, page_of(slot))
    yield pool
    torch.cuda.synchronize()
    pool.close()


def test_both_ways_of_copying_keep_every_bit(copies: PageCopies, pinned: HostPool) -> None:
    device = DevicePool(SPEC, 8, torch.device("cuda"))
    torch.cuda.synchronize()
    there = copies.prepare(Lane.FETCH, [(0, 5), (1, 2), (7, 0)])
    copies.start(Lane.FETCH, pinned.rows(), device.rows(), there)
    torch.cuda.synchronize()
    for source, target in there.rows:
        assert same_bits(device.data[:, :, target], page_of(source))
    assert not device.data[:, :, [1, 3, 4, 6, 7]].any()
    copies.start(Lane.SPILL, device.rows(), pinned.rows(), copies.prepare(Lane.SPILL, [(5, 3), (2, 6)]))
    torch.cuda.synchronize()
    for slot, value in enumerate([0, 1, 2, 0, 4, 5, 1, 7]):
        assert same_bits(pinned.page(slot), page_of(value))


def test_spills_and_fetches_over_reused_slots(copies: PageCopies, pinned: HostPool) -> None:
    """The device is behind the host all the time; slots are filled again as soon as plans allow it."""
    device = DevicePool(SPEC, 4, torch.device("cuda"))
    mover, ids, found = Mover(device, pinned, None, copies), count(), []
    torch.cuda.synchronize()
    for step in range(40):
        slot, other = step % 4, (step + 1) % 4
        device.data[:, :, slot].copy_(page_of(100 + step).cuda())
        torch.cuda._sleep(SLEEP // 10)
        device.data[:, :, slot].copy_(device.data[:, :, slot].clone())  # read and written late
        spill = Transfer(next(ids), Tier.DEVICE, slot, Tier.HOST, step % 3)
        fetch = Transfer(next(ids), Tier.HOST, step % 3, Tier.DEVICE, other)  # what was just spilled
        again = Transfer(next(ids), Tier.HOST, 4 + step % 4, Tier.DEVICE, slot)  # where it was spilled from
        mover.start([spill, fetch, again], [spill.id, fetch.id, again.id])
        found.append((100 + step, device.data[:, :, other].clone()))
        found.append((4 + step % 4, device.data[:, :, slot].clone()))
    ends = list(range(next(ids)))
    mover.wait(ends)
    assert mover.report().done == ends
    torch.cuda.synchronize()
    for value, page in found:
        assert same_bits(page, page_of(value))
    mover.close()


def test_loads_run_ahead_and_slots_are_filled_behind_them(copies: PageCopies, pinned: HostPool) -> None:
    """Steps follow each other without the host waiting; between them a spill fills what the one before has streamed."""
    device = DevicePool(SPEC, 2, torch.device("cuda"))
    mover = Mover(device, pinned, None, copies)
    ring = StagingRing(SPEC, NUM_BUFFERS * 3, pinned, None, None, torch.device("cuda"), copies, mover.filling)
    loads, content, found = [[3, 4, 5], [7, 0], [1], [6, 2]], list(range(8)), []
    for step in range(12):
        stream = ring.begin([[location(Tier.HOST, slot) for slot in load] for load in loads])
        for layer in range(SPEC.num_layers):
            for load in loads:
                buffer = stream.take()
                torch.cuda._sleep(SLEEP // 100)
                found.append((layer, [content[slot] for slot in load], buffer.clone()))
        stream.close()
        device.data[:, :, 0].copy_(page_of(200 + step).cuda())
        content[step % 8] = 200 + step
        mover.start([Transfer(step, Tier.DEVICE, 0, Tier.HOST, step % 8)], [step])
    torch.cuda.synchronize()
    for layer, values, pages in found:
        for value, page in zip(values, pages, strict=True):
            assert same_bits(page, page_of(value)[layer])
    mover.close()
    ring.close()


def test_disk_reads_run_ahead(tmp_path: Path, copies: PageCopies, pinned: HostPool) -> None:
    """Through memory for a few slices, which is read into again while the device is behind."""
    pytest.importorskip("zarr", reason="the disk tier is written through zarr")
    from distkv.storage.cache_folder import DiskHeads
    from distkv.storage.disk_array import make_array
    from distkv.storage.disk_pool import DiskPool
    from distkv.storage.read_ahead import ReadAhead

    make_array(tmp_path, SPEC, 6)
    disk = DiskPool(SPEC, tmp_path, 6, DiskHeads(0, SPEC.num_kv_heads))
    for slot in range(6):
        disk.store(slot, page_of(50 + slot))
    disk.chunk_path(4, 0).unlink()
    memory = ReadAhead(SPEC, 3, disk, pinned=True)
    ring = StagingRing(SPEC, NUM_BUFFERS * 2, pinned, disk, memory, torch.device("cuda"), copies)
    places = [location(Tier.DISK, slot) for slot in range(6)]
    loads = [places[:2], [location(Tier.HOST, 3), places[2]], places[3:5], places[5:]]
    values = [[50, 51], [3, 52], [53, None], [55]]
    found = []
    for _ in range(5):
        stream = ring.begin(loads)
        for layer in range(SPEC.num_layers):
            for expected in values:
                buffer = stream.take()
                torch.cuda._sleep(SLEEP // 50)
                found.append((layer, expected, buffer.clone()))
        stream.close()
        assert list(stream.bad_reads) == [4]
    torch.cuda.synchronize()
    for layer, expected, pages in found:
        for value, page in zip(expected, pages, strict=True):
            assert not page.any() if value is None else same_bits(page, page_of(value)[layer])
    memory.close()
    ring.close()
