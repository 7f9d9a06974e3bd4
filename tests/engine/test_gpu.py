"""The single-rank path on a CUDA device. Run with `pytest -m gpu`; needs neither ray nor zarr."""

import gc
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.checkpoints import save_llama
from support.llms import idle_engine
from support.measures import relative_error
from support.prompts import random_prompt, random_prompts, seeded
from support.rules import rule_requests, save_speaking_llama
from support.runs import run
from support.sample_rows import GREEDY as GREEDY_ROW
from support.sample_rows import PLAIN
from torch import Tensor

from distkv import LLM, SamplingParams
from distkv.storage.synthetic_pages import synthetic_slice
from distkv.workers.group.communicators import Communicators
from distkv.workers.group.executor import StepResult
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.model.layout import Layout
from distkv.workers.sampling.sample_row import SampleRow
from distkv.workers.sampling.sampler import sample

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_greedy_tokens_equal_those_of_transformers(tmp_path: Path, heads: int, kv_heads: int) -> None:
    folder, peer = save_llama(tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads)
    prompts = random_prompts(1, 5, 70, 150)
    with LLM(folder, device="cuda", page_size=16, max_num_batched_tokens=64, device_kv_bytes="8MiB") as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    peer = peer.cuda()
    for prompt, output in zip(prompts, outputs, strict=True):
        generated = peer.generate(
            torch.tensor([prompt], device="cuda"), max_new_tokens=48, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert output.outputs[0].token_ids == generated[0, len(prompt) :].tolist()


def test_rules_hold_and_prompts_are_scored_as_on_a_cpu(tmp_path: Path) -> None:
    """Grammars and bad words know the token that the step before has sampled; scores come a block at a time."""
    folder = save_speaking_llama(tmp_path)
    prompts, params = map(list, zip(*rule_requests(), strict=True))
    options: dict[str, Any] = {"page_size": 16, "max_num_batched_tokens": 64, "device_kv_bytes": "8MiB"}
    with LLM(folder, device="cpu", **options) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    with LLM(folder, device="cuda", **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for output, other in zip(outputs, expected, strict=True):
        assert [one.token_ids for one in output.outputs] == [one.token_ids for one in other.outputs]
        for table, wanted in zip(output.prompt_logprobs or [], other.prompt_logprobs or [], strict=True):
            for token, entry in (table or {}).items():
                assert wanted is not None and entry.logprob == pytest.approx(wanted[token].logprob, abs=1e-3)


def test_the_device_pool_is_sized_by_gpu_memory_utilization(tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path, max_position_embeddings=1 << 20)
    before = torch.cuda.mem_get_info()[0]
    total = torch.cuda.mem_get_info()[1]
    options = {"gpu_memory_utilization": 0.5, "host_kv_bytes": 0, "max_num_seqs": 256, "dtype": "bfloat16"}
    with LLM(folder, device="cuda", **options) as llm:
        assert llm.info.pool_bytes <= 0.5 * total
        assert llm.info.pool_bytes > 0.5 * total - (total - before) - 4 * 2**30
        assert llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0].finish_reason == "length"


def test_graphs_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that come and go, through graphs of several sizes and through single launches."""
    folder, _ = save_llama(tmp_path / "model", num_attention_heads=8, num_key_value_heads=2, hidden_size=512)
    prompts = random_prompts(20, 3, 120, 77, 1, 64)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 30, 17, 60, 44, 5)]
    options = {"page_size": 16, "max_num_batched_tokens": 128, "max_num_seqs": 6, "device": "cuda", "dtype": "bfloat16"}
    graphs = run(folder, prompts, params, **options)
    monkeypatch.setattr("distkv.workers.backends.cuda.CudaBackend.captures", False)
    run(folder, prompts, params, **options).assert_same(graphs)


@pytest.mark.parametrize("gain", [0.0, float("inf")], ids=["gather kernel", "copy engine"])
def test_tiers_change_no_bit_and_memory_stays_flat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float
) -> None:
    """Decode and prefill over a host tier, and the device memory of contexts that differ fourfold."""
    from distkv.workers.runners.compile_ahead import join_compilers  # which imports triton

    monkeypatch.setattr("distkv.workers.bandwidth.KERNEL_GAIN", gain)
    torch.backends.cuda.matmul.allow_tf32 = False
    folder, _ = save_llama(
        tmp_path / "model", num_attention_heads=8, num_key_value_heads=2, hidden_size=512, max_position_embeddings=65536
    )
    options = {"page_size": 64, "max_num_batched_tokens": 512, "max_num_seqs": 1}
    peaks = []
    for length in (4000, 4000, 16000):  # the first takes what libraries keep, on a stream or for a thread
        prompt = random_prompt(length, length)
        resident = run(folder, [prompt], pages=(length // 64 + 2, 0, 0), **options)
        join_compilers()  # which hold its pool
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        tiered = run(folder, [prompt], pages=(12, length // 64 + 2, 0), **options)
        peaks.append(torch.cuda.max_memory_allocated())
        tiered.assert_same(resident)
        assert tiered.moved("host_streamed") > 20 * (length // 64 - 12) * tiered.page_bytes
    assert peaks[2] - peaks[1] < 4 * 2**20, peaks


@pytest.mark.parametrize(
    "codec, dtype, batch_invariant",
    [
        ("int4", "bfloat16", False),
        ("int8", "float16", True),
        ("fp8_e4m3", "bfloat16", False),
        ("int4", "float32", False),
    ],
)
def test_codes_are_the_same_in_all_tiers(tmp_path: Path, codec: str, dtype: str, batch_invariant: bool) -> None:
    """Graphs and single launches that fill pages, and codes that stream; near to what a CPU computes of codes."""
    torch.backends.cuda.matmul.allow_tf32 = False
    folder, _ = save_llama(
        tmp_path / "model", num_attention_heads=8, num_key_value_heads=2, hidden_size=512, max_position_embeddings=4096
    )
    options: dict[str, Any] = {
        "page_size": 64, "max_num_batched_tokens": 512, "max_num_seqs": 2, "dtype": dtype, "kv_cache_dtype": codec,
    }  # fmt: skip
    prompts = random_prompts(1500, 40)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (70, 90)]
    on_cuda = {"device": "cuda", "batch_invariant": batch_invariant}
    resident = run(folder, prompts, params, pages=(30, 1, 0), **options, **on_cuda)
    tiered = run(folder, prompts, params, pages=(12, 40, 0), **options, **on_cuda)
    tiered.assert_same(resident)
    assert tiered.moved("host_streamed") and tiered.moved("device_to_host")
    if dtype == "float32":
        native = run(folder, prompts, params, pages=(30, 1, 0), device="cpu", **options)
        assert relative_error(resident.logits[0].cpu(), native.logits[0]) < 1e-3


def test_few_new_tokens_are_compiled_beside_the_engine(tmp_path: Path) -> None:
    """Prompts of each length up to that of prefill, at once, while threads are still at their kernels."""
    folder, peer = save_llama(tmp_path, head_dim=64, num_attention_heads=4, num_key_value_heads=2)
    prompts = random_prompts(*range(8, 0, -1))
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    peer = peer.cuda()
    with LLM(folder, device="cuda", page_size=16, device_kv_bytes="8MiB", max_num_seqs=8) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        generated = peer.generate(
            torch.tensor([prompt], device="cuda"), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert output.outputs[0].token_ids == generated[0, len(prompt) :].tolist()


def test_random_pages_are_the_same_whenever_they_are_made() -> None:
    device = torch.device("cuda")
    once = synthetic_slice(7, 3, range(4), 64, 32, device)
    assert once.is_cuda and torch.equal(once[:, 2:], synthetic_slice(7, 3, range(2, 4), 64, 32, device))
    assert once[0].std().item() == pytest.approx(1, abs=0.05) and not torch.equal(once[:, 0], once[:, 1])


def sample_rows_of_all_kinds() -> list[SampleRow]:
    """A row of each way to draw, with and without penalties, log-probabilities and a token that is late."""
    rows = [GREEDY_ROW, PLAIN, replace(PLAIN, temperature=0.6, min_p=0.1), replace(PLAIN, top_k=5, top_p=0.9)]
    seen = {"prompt_token_ids": [3, 9, 9], "output_token_ids": [4, 4, 17]}
    rows += [replace(row, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, **seen) for row in rows]
    rows += [replace(row, num_logprobs=number % 3) for number, row in enumerate(rows)]
    rows += [replace(row, output_token_ids=[4, 4], pending=number % 2) for number, row in enumerate(rows)]
    return [replace(row, logits_row=number, uniform=number / 97) for number, row in enumerate(rows)]


def test_drawing_waits_for_nothing() -> None:
    """All ways to draw, one by one and together; the tokens are those of a CPU, where rounding does not decide."""
    rows = sample_rows_of_all_kinds()
    logits = torch.randn(len(rows), 40_001, generator=seeded(3)) * 2.5  # most rows begin within a line of memory
    before = torch.tensor([17, 17])
    expected = [token for token, _ in sample(logits, rows, before).result()]
    there, before = logits.cuda(), before.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        together = sample(there, rows, before)
        backwards = sample(there, rows[::-1], before)
        alone = [sample(there[row.logits_row :][:1], [replace(row, logits_row=0)], before) for row in rows]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = together.result()
    assert backwards.result() == found[::-1]
    assert [token for token, _ in found] == expected
    assert together.tokens.tolist() == expected
    for row, (token, table), one in zip(rows, found, alone, strict=True):
        [(own_token, own_table)] = one.result()
        assert own_token == token and (table is None) == (row.num_logprobs is None) == (own_table is None)
        if table is not None and own_table is not None:
            assert (own_table.rank, [top for top, _ in own_table.top]) == (table.rank, [top for top, _ in table.top])
            assert own_table.logprob == pytest.approx(table.logprob, abs=1e-5)


def test_no_step_of_a_decode_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident sequences, with all that a row may ask for: what the step's thread does raises where it would wait. A
    failed step would show as an error of its request, or as one more step."""
    folder, _ = save_llama(tmp_path, num_attention_heads=8, num_key_value_heads=2, hidden_size=512)
    prompts = random_prompts(1, 20, 70, 5)
    params = [
        SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=3),
        SamplingParams(temperature=1, seed=1, max_tokens=60, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=2, top_p=0.9, repetition_penalty=1.2, max_tokens=60, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, frequency_penalty=0.3, logprobs=1),
    ]
    with LLM(folder, device="cuda", page_size=16, device_kv_bytes="8MiB", enable_prefix_caching=False) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)  # warms up what is made on first use
        executor = idle_engine(llm)._runner.executor
        execute = executor.run
        errors: list[Exception] = []
        num_strict = 0

        def strict(plan: StepPlan, rows: list[SampleRow]) -> StepResult:
            nonlocal num_strict
            is_decode = bool(plan.sequences) and all(len(part.token_ids) == 1 for part in plan.sequences)
            is_decode = is_decode and all(part.start >= part.prompt_len for part in plan.sequences)
            num_strict += is_decode
            torch.cuda.set_sync_debug_mode("error" if is_decode else "default")
            try:
                result = execute(plan, rows)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            errors.extend([result.error] if result.error is not None else [])
            return result

        monkeypatch.setattr(executor, "run", strict)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert not errors, errors
    assert num_strict >= 59
    for output, other in zip(outputs, expected, strict=True):
        assert output.error is None
        assert output.outputs[0].token_ids == other.outputs[0].token_ids


def _collectives(rank: int, port: int, folder: str) -> None:
    torch.cuda.set_device(0)
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    peers = Communicators.join(Layout(2), rank, store, "gloo")
    group = peers.stage
    drawn = torch.tensor([7, 8, 9] if rank == 0 else [0, 0, 0], device="cuda")
    total = group.all_reduce(torch.full((4,), rank + 1.0, device="cuda"))
    gathered = group.gather_columns(torch.full((2, 3 - rank), rank + 1.0, device="cuda"), [3, 2])
    seen: dict[str, Tensor | None] = {"drawn": group.broadcast(drawn), "total": total, "gathered": gathered}
    torch.save(seen, Path(folder, f"{rank}.pt"))
    peers.close()


def test_ranks_that_share_a_gpu(tmp_path: Path) -> None:
    """Over gloo, which has no gather for CUDA tensors."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_collectives, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt")
        assert seen["drawn"].is_cuda and seen["drawn"].tolist() == [7, 8, 9]
        assert seen["total"].tolist() == [3.0] * 4
        if rank == 0:
            assert seen["gathered"].is_cuda and seen["gathered"].tolist() == [[1.0, 1.0, 1.0, 2.0, 2.0]] * 2
        else:
            assert seen["gathered"] is None
