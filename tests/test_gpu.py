"""The single-rank path on a CUDA device. Run with `pytest -m gpu`; needs neither ray nor zarr."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read_prefix, relative_error, save_llama, seeded
from test_residency import run

from distkv import LLM, SamplingParams
from distkv.kernels import reference
from distkv.kernels.attention import attend, prefill_attention

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


def test_tiers_change_no_bit_and_memory_stays_flat(tmp_path: Path) -> None:
    """Decode and prefill over a host tier, and the device memory of contexts that differ fourfold."""
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
